"""Documents and users as units: one clipped example each, or priced groups."""

import dataclasses

import dp_accounting
from dp_accounting import dp_event
from dp_accounting import pld
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from dptrain.clipping import methods
from dptrain.clipping import per_example
from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.data import store as store_lib
from dptrain.data import units
from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import report as report_lib
from dptrain.training import loop
from dptrain.training import objective

UNITS, K = 5, 3


def corpus(num_examples=200, units=40, seed=0):
  """Records of users, the first of whom holds a third of all."""
  owners = np.arange(num_examples) % units
  owners[: num_examples // 3] = 0
  return store_lib.RecordStore(
    small_run.store(num_examples, seed).tokens,
    documents=np.arange(num_examples, dtype=np.uint64) // 2,
    users=owners.astype(np.uint64) + 1000,
  )


def make_run(model_dir, records_per_unit=K, unit_sampling="units", **options):
  unit = options.pop("unit", "user")
  run = small_run.make_run(
    model_dir, sizes=(10, 20), physical_batch_size=8, **options
  )
  return dataclasses.replace(
    run,
    privacy=dataclasses.replace(
      run.privacy,
      unit=unit,
      records_per_unit=records_per_unit,
      unit_sampling=unit_sampling,
      unit_name="any one president's addresses",
    ),
  )


def records(train=None, validation=None):
  made = small_run.records(validation=False)
  return made._replace(train=train or corpus(), validation=validation)


@pytest.fixture(scope="module")
def case():
  """Losses of units under a quick model, and a batch of them."""
  model = small_run.QuickModel(small_run.model().bert)
  losses = objective.Objective(model, masking.MaskingSettings()).losses
  store = units.by_unit(corpus(), corpus().users, K, b"seed")
  batch = {"tokens": jnp.asarray(store.gather(np.arange(UNITS)))}
  # One unit has a single record.
  batch["tokens"] = batch["tokens"].at[2, 1:].set(0)
  keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), UNITS)
  return losses, model.init(jax.random.key(0)), batch, keys


def test_a_units_gradient_is_that_of_the_mean_over_its_records(case):
  losses, params, batch, keys = case
  of_records = objective.Objective(
    small_run.QuickModel(small_run.model().bert), masking.MaskingSettings()
  ).losses
  rule = rules.ClippingRule("flat", 0.05)
  found = per_example.clipped_sum(
    losses, params, batch, keys, jnp.zeros(UNITS, bool), rule
  )
  total = jax.tree.map(lambda x: np.zeros(x.shape), params)
  for unit in range(UNITS):
    own = jax.random.split(keys[unit], K)
    there = [i for i in range(K) if batch["tokens"][unit, i].any()]

    def mean(params, unit=unit, own=own, there=there):
      rows = jnp.stack([batch["tokens"][unit, i] for i in there])
      picked = own[jnp.asarray(there)]
      return jnp.mean(of_records(params, {"tokens": rows}, picked)[0])

    gradient = jax.tree.map(
      lambda g: np.asarray(g, np.float64), jax.grad(mean)(params)
    )
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    scale = min(1.0, 0.05 / norm)
    total = jax.tree.map(lambda t, g, s=scale: t + s * g, total, gradient)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    found.gradients,
    total,
  )


def test_every_method_clips_units_alike():
  model = small_run.model()
  losses = objective.Objective(model, masking.MaskingSettings()).losses
  store = units.by_unit(corpus(), corpus().users, 2, b"seed")
  batch = {"tokens": jnp.asarray(store.gather(np.arange(3)))}
  keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), 3)
  params = model.init(jax.random.key(0))
  chosen = methods.choose(losses, params, batch, keys, "one_pass")
  assert len(chosen.uses) > 4  # units do not hide the layers
  methods.check_against_vmap(losses, params, batch, keys)


@given(unit=st.integers(0, UNITS - 1), seed=st.integers(0, 2**20))
@settings(deadline=None, max_examples=15)
def test_a_unit_moves_the_sum_by_at_most_the_sensitivity(case, unit, seed):
  losses, params, batch, keys = case
  rule = rules.ClippingRule("flat", 0.05)
  draw = np.random.default_rng(seed)
  tokens = np.array(batch["tokens"])
  tokens[unit] = draw.integers(5, small_run.VOCABULARY, tokens[unit].shape)
  present = np.zeros(UNITS, bool)
  sums = [
    per_example.clipped_sum(
      losses, params, {"tokens": jnp.asarray(tokens)}, keys, absent, rule
    ).gradients
    for absent in (
      jnp.asarray(present),
      jnp.asarray(np.arange(UNITS) == unit),
    )
  ]
  moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), *sums)
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(moved)))
  assert norm <= 0.05 * (1 + 1e-5)


def test_a_run_at_user_level(tmp_path):
  result = loop.train(make_run(tmp_path), records())
  assert result.step == 6
  ledger = ledger_lib.read(tmp_path)
  assert ledger.header["plan"]["num_examples"] == 40
  expected = [accounting.Releases(3, b / 40, 4.0) for b in (10, 20)]
  assert ledger.releases() == expected
  text = " ".join(report_lib.make_report(ledger).as_text().split())
  assert (
    "privacy unit any one president's addresses (of which at most 3" in text
  )
  assert "as one example" in text
  assert "users 40 sampling poisson: each user independently" in text
  assert "The number of users is treated as public." in text


def test_a_run_at_document_level_goes_on_bit_for_bit(tmp_path):
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  for folder in (whole, halves):
    loop.train(make_run(folder, unit="document"), records())
  small_run.cut(halves, 4)
  loop.train(make_run(halves, unit="document"), records())
  small_run.assert_same(whole, halves)
  assert ledger_lib.read(whole).header["plan"]["num_examples"] == 100


def test_groups_of_sampled_records_are_priced(tmp_path):
  result = loop.train(make_run(tmp_path, unit_sampling="records"), records())
  ledger = ledger_lib.read(tmp_path)
  kept = ledger.header["plan"]["num_examples"]
  assert kept == len(units.kept(corpus().users, K, b"any")) == 120
  losses = pld.PLDAccountant(
    dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3
  )
  for batch in (10, 20):
    q = batch / kept
    chances = [(1 - q) ** 3, 3 * q * (1 - q) ** 2, 3 * q**2 * (1 - q), q**3]
    losses.compose(
      dp_event.MixtureOfGaussiansDpEvent(4.0, [0, 1, 2, 3], chances), 3
    )
  exact = losses.get_epsilon(1e-5)
  assert result.epsilon == pytest.approx(exact, rel=2e-3)
  alone = [accounting.Releases(3, b / kept, 4.0) for b in (10, 20)]
  assert result.epsilon > accounting.epsilon(alone, 1e-5).value
  text = " ".join(report_lib.make_report(ledger).as_text().split())
  assert "each sampled on its own; groups of 3 are priced" in text


def test_a_unit_in_both_splits_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"user\(s\) have records in both split"):
    loop.train(make_run(tmp_path), records(validation=corpus(60, seed=9)))
  assert not (tmp_path / "privacy_ledger.jsonl").read_bytes()


def test_a_corpus_that_does_not_tell_its_users_is_refused(tmp_path):
  anonymous = store_lib.RecordStore(corpus().tokens)
  with pytest.raises(ValueError, match=r"unit='user', but .* feature 'unit'"):
    loop.train(make_run(tmp_path), records(anonymous))


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"records_per_unit": 0}, "records_per_unit=0 must be a whole number"),
    ({"unit": "record"}, "records_per_unit=3 is for unit='document'"),
    ({"unit": "family"}, "unit='family' is not supported; use one of 'record'"),
    ({"unit_sampling": "no"}, "unit_sampling='no' is not supported"),
    (
      {"unit_sampling": "records", "sampling": "shuffled"},
      "unit_sampling='records' is priced for sampling='poisson'",
    ),
  ],
)
def test_settings_that_have_no_price_are_refused(tmp_path, changes, told):
  privacy = make_run(tmp_path).privacy
  with pytest.raises(ValueError, match=told):
    dataclasses.replace(privacy, **changes)
