"""What is drawn is what the plan's releases price."""

import dataclasses

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from dptrain.privacy import draws
from dptrain.privacy import keys
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import rounds
from dptrain.privacy import sampling
from dptrain.privacy import schedule

SEED = keys.fixed_seed(3)
N = 60


def key_of(purpose, step, branch="b"):
  return SEED.key(purpose, branch, step)


def plan(kind, sizes=((12, 40),), relation="zero_out", num=N, **options):
  phases = [schedule.Phase(size, size, until) for size, until in sizes]
  return plan_lib.make_plan(
    plan_lib.PrivacySettings(
      schedule=schedule.BatchSchedule(phases),
      delta=1e-3,
      noise_multiplier=2.0,
      sampling=kind,
      relation=relation,
      **options,
    ),
    num,
  )


def table(made, start=0, branch="b"):
  """Bool [S, N]: who takes part in which update."""
  found = np.zeros((made.num_steps - start, N), bool)
  for step in range(start, made.num_steps):
    drawn = draws.draw(made, lambda p, s: key_of(p, s, branch), N, step, start)
    assert (np.diff(drawn) > 0).all()
    found[step - start, drawn] = True
  return found


def test_poisson_is_the_plain_sample():
  made = plan("poisson")
  expected = sampling.poisson_sample(key_of("sampling", 5), N, 0.2)
  np.testing.assert_array_equal(draws.draw(made, key_of, N, 5), expected)


def test_one_band_is_poisson_bit_for_bit():
  one, other = (table(plan(kind)) for kind in ("poisson", "cyclic_poisson"))
  np.testing.assert_array_equal(one, other)
  assert plan("poisson").releases() == plan("cyclic_poisson").releases()


def test_a_truncated_sample_is_a_uniform_part_of_the_poisson_sample():
  made = plan("truncated_poisson", ((12, 3000),), truncation_deviations=0.5)
  cap = made.truncated_batch_size(0)
  assert cap == int(np.ceil(12 + 0.5 * np.sqrt(12 * 0.8))) == 14
  found = table(made)
  sizes = found.sum(axis=1)
  binomial = stats.binom(N, 0.2)
  assert sizes.max() == cap
  full = (sizes == cap).mean()
  assert full == pytest.approx(binomial.sf(cap - 1), abs=0.04)
  share = found.mean(axis=0)
  assert np.abs(share - sizes.mean() / N).max() < 4.5 * np.sqrt(0.16 / 3000)


def test_a_plan_that_truncates_is_priced_so():
  made = plan("truncated_poisson", ((12, 3), (20, 5)))
  found = [
    (r.count, r.sampling_prob, r.sampling, r.num_examples)
    for r in made.releases()
  ]
  assert found == [
    (3, 12 / N, "truncated_poisson", N),
    (2, 20 / N, "truncated_poisson", N),
  ]
  caps = [r.truncated_batch_size for r in made.releases()]
  assert caps == [made.truncated_batch_size(step) for step in (0, 3)]


def test_a_fixed_size_is_fixed_and_uniform():
  found = table(plan("without_replacement", ((12, 3000),), "replace_one"))
  assert (found.sum(axis=1) == 12).all()
  assert np.abs(found.mean(axis=0) - 0.2).max() < 4.5 * np.sqrt(0.16 / 3000)


@given(
  sizes=st.lists(st.integers(1, N), min_size=1, max_size=40),
  start=st.integers(0, 5),
)
@settings(deadline=None, max_examples=12)
def test_nobody_takes_part_twice_in_a_round(sizes, start):
  phases = tuple((size, until) for until, size in enumerate(sizes, 1))
  start = min(start, len(sizes) - 1)
  for kind, options in (
    ("shuffled", {}),
    ("balls_in_bins", {}),
    ("cyclic_poisson", {"bands": 3}),
  ):
    if kind == "balls_in_bins":
      phases = ((sizes[0], len(sizes)),)
    if kind == "cyclic_poisson":
      phases = tuple((max(1, s // 3), until) for s, until in phases)
    made = plan(kind, phases, **options)
    found = table(made, start)
    numbers = [
      made.round_number(step, start) for step in range(start, made.num_steps)
    ]
    for number in set(numbers):
      assert found[np.equal(numbers, number)].sum(axis=0).max() <= 1
    priced = made.releases(start)
    assert sum(r.count for r in priced) == len(set(numbers))


def test_shuffled_passes_are_permutations():
  made = plan("shuffled", ((12, 15),))
  found = table(made)
  for begin in (0, 5, 10):
    assert (found[begin : begin + 5].sum(axis=0) == 1).all()
  assert (found[0] != found[5]).any()
  assert made.releases() == [plan_lib.accounting.Releases(3, 1.0, 2.0)]


def test_a_batch_never_lies_across_two_passes():
  epochs, offsets = rounds.shuffled_places((25, 25, 25, 40, 20), N)
  assert epochs.tolist() == [0, 0, 1, 2, 2]
  assert offsets.tolist() == [0, 25, 0, 0, 40]


def test_balls_in_bins_are_a_partition_at_random():
  made = plan("balls_in_bins", ((12, 15),))
  found = table(made)
  for begin in (0, 5, 10):
    assert (found[begin : begin + 5].sum(axis=0) == 1).all()
  np.testing.assert_array_equal(found[:5], found[5:10])
  sizes = np.array([table(made, branch=str(b))[0].sum() for b in range(300)])
  assert sizes.mean() == pytest.approx(12, abs=4.5 * np.sqrt(9.6 / 300))
  assert sizes.var() == pytest.approx(9.6, rel=0.4)


def test_groups_take_turns_and_are_sampled_within():
  made = plan("cyclic_poisson", ((5, 4000),), bands=4)
  found = table(made)
  for group in range(4):
    members = found[group::4].any(axis=0)
    assert members.sum() == N // 4
    assert found[group::4].mean(axis=0)[members] == pytest.approx(
      5 / 15, abs=4.5 * np.sqrt(0.25 / 1000)
    )
  assert made.sampling_prob(0) == 5 / 15
  assert made.releases() == [plan_lib.accounting.Releases(1000, 5 / 15, 2.0)]


def test_nobody_takes_part_twice_within_the_bands():
  found = table(plan("cyclic_poisson", ((10, 30),), bands=4)).astype(int)
  for step in range(27):
    assert found[step : step + 4].sum(axis=0).max() <= 1


def test_a_round_is_priced_at_its_dearest_update():
  made = plan("cyclic_poisson", ((5, 3), (8, 9)), bands=4)
  counts = [(r.count, r.sampling_prob) for r in made.releases()]
  assert counts == [(3, 8 / 15)]
  # A branch counts its rounds from where it begins.
  counts = [(r.count, r.sampling_prob) for r in made.releases(1, 9)]
  assert counts == [(2, 8 / 15)]
  assert [made.round_number(s, 1) for s in range(1, 9)] == [1] * 4 + [5] * 4
  prefix = [(r.count, r.sampling_prob) for r in made.releases(0, 2)]
  assert prefix == [(1, 5 / 15)]


def test_draws_depend_on_branch_and_key_alone():
  made = plan("shuffled", ((12, 15),))
  np.testing.assert_array_equal(table(made), table(made))
  assert (table(made) != table(made, branch="c")).any()


def test_where_the_number_of_records_is_private_an_estimate_is_priced():
  made = plan(
    "poisson", relation="add_or_remove_one", public_num_examples=50, num=N
  )
  assert made.num_examples == 50
  assert made.sampling_prob(0) == 12 / 50
  other = plan(
    "poisson", relation="add_or_remove_one", public_num_examples=50, num=N + 1
  )
  assert dataclasses.asdict(made) == dataclasses.asdict(other)


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"kind": "without_replacement"}, r"'zero_out' cannot .*'replace_one'"),
    ({"kind": "shuffled", "relation": "add_or_remove_one"}, "cannot be priced"),
    ({"kind": "dice"}, r"sampling='dice' is not known; use one of 'poisson'"),
    ({"kind": "poisson", "relation": "any"}, "relation='any' is not known"),
    ({"kind": "poisson", "bands": 2}, r"bands=2 .* sampling='cyclic_poisson'"),
    ({"kind": "cyclic_poisson", "bands": 0}, r"bands=0 must be a whole"),
    ({"kind": "cyclic_poisson", "bands": 10}, r"exceeds each of the 10 groups"),
    (
      {"kind": "poisson", "relation": "add_or_remove_one"},
      r"public_num_examples=None must be .* is private: give a public",
    ),
    ({"kind": "poisson", "public_num_examples": 9}, r"is for relation='add_or"),
    (
      {"kind": "truncated_poisson", "truncation_deviations": 0.0},
      r"truncation_deviations=0.0 must be",
    ),
    (
      {"kind": "balls_in_bins", "sizes": ((4, 2), (8, 4))},
      "BatchSchedule must be constant",
    ),
  ],
)
def test_what_has_no_price_is_refused_at_once(options, told):
  with pytest.raises(ValueError, match=told):
    plan(**options)
