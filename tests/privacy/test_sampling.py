import itertools
import tracemalloc

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from scipy import stats

from dptrain.privacy import keys
from dptrain.privacy import sampling
from dptrain.privacy.sampling import fixed_size
from dptrain.privacy.sampling import poisson
from dptrain.privacy.sampling import poisson_sample

SEED = keys.fixed_seed(0)
# Fixed keys, so a right sampler passes always; a wrong one by far more.
Z, P = 4.5, 1e-4


def key(step, branch="b"):
  return SEED.key("sampling", branch, step)


def memberships(num_examples, sampling_prob, draws, branch):
  """Bool [draws, N]: who took part in which sample."""
  table = np.zeros((draws, num_examples), bool)
  for step in range(draws):
    sample = poisson_sample(key(step, branch), num_examples, sampling_prob)
    table[step, sample] = True
  return table


@pytest.fixture(scope="module", params=[sampling.BLOCK, 5])
def table(request):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, "BLOCK", request.param)
    return memberships(12, 0.3, 4000, f"many{request.param}")


@given(
  step=st.integers(0, 10**6),
  num_examples=st.integers(1, 500) | st.integers(10_000, 40_000),
  sampling_prob=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_samples_are_sorted_distinct_and_in_range(
  step, num_examples, sampling_prob
):
  sample = poisson_sample(key(step), num_examples, sampling_prob)
  assert sample.dtype == np.int64
  assert sample.ndim == 1
  assert (np.diff(sample) > 0).all()
  if sample.size:
    assert sample[0] >= 0
    assert sample[-1] < num_examples


@pytest.mark.parametrize("num_examples", [1, 7, 20_000])
def test_nobody_and_everybody(num_examples):
  assert poisson_sample(key(0), num_examples, 0.0).size == 0
  everybody = poisson_sample(key(0), num_examples, 1.0)
  np.testing.assert_array_equal(everybody, np.arange(num_examples))


def test_a_key_decides_the_sample():
  again = [poisson_sample(key(3), 1000, 0.1) for _ in range(2)]
  np.testing.assert_array_equal(*again)


def test_keys_of_different_updates_give_different_samples():
  samples = {poisson_sample(key(s), 1000, 0.1).tobytes() for s in range(200)}
  assert len(samples) == 200


def test_settings_of_jax_do_not_change_the_sample():
  before = poisson_sample(key(3), 1000, 0.1)
  with jax.default_prng_impl("rbg"):
    np.testing.assert_array_equal(poisson_sample(key(3), 1000, 0.1), before)
  with jax.enable_x64(True):
    np.testing.assert_array_equal(poisson_sample(key(3), 1000, 0.1), before)


def test_sizes_are_binomial(table):
  sizes = table.sum(axis=1)
  expected = stats.binom(12, 0.3).pmf(np.arange(13)) * len(sizes)
  observed = np.bincount(sizes, minlength=13).astype(float)
  rare = expected < 5
  observed = np.append(observed[~rare], observed[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  assert stats.chisquare(observed, expected).pvalue > P


def test_everyone_is_included_equally_often(table):
  spread = (0.3 * 0.7 / len(table)) ** 0.5
  assert np.abs(table.mean(axis=0) - 0.3).max() < Z * spread


def test_pairs_are_included_independently(table):
  both = 0.3**2
  spread = (both * (1 - both) / len(table)) ** 0.5
  for i, j in itertools.combinations(range(12), 2):
    assert abs((table[:, i] & table[:, j]).mean() - both) < Z * spread


def test_samples_of_successive_updates_are_independent(table):
  overlap = (table[1:] & table[:-1]).mean(axis=0)
  both = 0.3**2
  # Neighbouring overlaps share a draw, which adds a little to the spread.
  spread = ((both * (1 - both) + 2 * (0.3**3 - both**2)) / len(table)) ** 0.5
  assert np.abs(overlap - both).max() < Z * spread


@pytest.mark.parametrize("block", [sampling.BLOCK, 3])
def test_every_subset_has_the_probability_of_independent_coins(
  block, monkeypatch
):
  monkeypatch.setattr(sampling, "BLOCK", block)
  # The whole law at once: 16 subsets of 4 examples.
  members = memberships(4, 0.4, 3000, f"subsets{block}")
  observed = np.bincount(members @ [1, 2, 4, 8], minlength=16)
  sizes = np.asarray([int(s).bit_count() for s in range(16)])
  expected = 0.4**sizes * 0.6 ** (4 - sizes) * 3000
  assert stats.chisquare(observed, expected).pvalue > P


def test_small_samples_of_large_corpora():
  # NumPy draws these by another algorithm.
  num_examples, sampling_prob, draws = 20_000, 0.005, 400
  samples = [
    poisson_sample(key(s, "large"), num_examples, sampling_prob)
    for s in range(draws)
  ]
  total = sum(map(len, samples))
  mean = num_examples * sampling_prob * draws
  assert abs(total - mean) < Z * (mean * (1 - sampling_prob)) ** 0.5
  bins = np.bincount(np.concatenate(samples) // 500, minlength=40)
  assert stats.chisquare(bins).pvalue > P
  sizes = np.asarray([len(sample) for sample in samples])
  variance = num_examples * sampling_prob * (1 - sampling_prob)
  ratio = sizes.var(ddof=1) / variance
  assert abs(ratio - 1) < Z * (2 / draws) ** 0.5


@pytest.mark.parametrize("sampling_prob", [-1e-9, 1.0000001, np.nan, np.inf])
def test_refuses_what_is_no_probability(sampling_prob):
  with pytest.raises(ValueError, match=r"sampling_prob=.* must lie in \[0, 1"):
    poisson_sample(key(0), 10, sampling_prob)


def test_refuses_an_empty_corpus():
  with pytest.raises(ValueError, match="num_examples=0 must be >= 1"):
    poisson_sample(key(0), 0, 0.5)


def test_a_million_inclusions_and_their_pairs_are_those_of_coins(monkeypatch):
  """Chi-square of single examples, of pairs in a block and across blocks."""
  monkeypatch.setattr(sampling, "BLOCK", 70)
  num_examples, prob, draws = 300, 0.5, 7000
  found = memberships(num_examples, prob, draws, "million")
  assert found.sum() >= 1e6
  variance = prob * (1 - prob)
  centred = (found - prob).astype(np.float32)
  squares = (centred.T @ centred).astype(np.float64) ** 2 / draws / variance**2
  blocks = np.arange(num_examples) // 70
  same = blocks[:, None] == blocks
  above = np.triu(np.ones_like(same), 1)
  for pairs in (above & same, above & ~same):
    statistic = squares[pairs].sum()
    assert P < stats.chi2(pairs.sum()).cdf(statistic) < 1 - P
  singles = (found.sum(axis=0) - draws * prob) ** 2 / draws / variance
  assert P < stats.chi2(num_examples).cdf(singles.sum()) < 1 - P


def test_a_large_corpus_by_place_by_block_and_by_pairs_at_a_distance():
  num_examples, prob = 346_000_000, 0.006
  sample = poisson_sample(key(0, "huge"), num_examples, prob)
  assert len(sample) >= 1e6
  assert (np.diff(sample) > 0).all()
  whole = sample[sample < num_examples // sampling.BLOCK * sampling.BLOCK]
  for bins in (whole // sampling.BLOCK, whole % sampling.BLOCK // 256):
    observed = np.bincount(bins)
    spread = observed.mean() * (1 - prob)
    statistic = ((observed - observed.mean()) ** 2).sum() / spread
    assert P < stats.chi2(len(observed) - 1).cdf(statistic) < 1 - P
  # How many pairs at each distance: blocks that draw alike show at BLOCK.
  distances = np.array([*range(1, 20)] + [sampling.BLOCK * i for i in (1, 2)])
  pairs = np.array(
    [np.isin(sample + d, sample, assume_unique=True).sum() for d in distances]
  )
  expected = (num_examples - distances) * prob**2
  statistic = ((pairs - expected) ** 2 / expected).sum()
  assert P < stats.chi2(len(distances)).cdf(statistic) < 1 - P


def sample_of(kind, step, num_examples, size):
  if kind == "fixed":
    return fixed_size(key(step, kind), num_examples, size)
  cap = size if kind == "truncated" else None
  prob = size / num_examples
  return poisson(key(step, kind), num_examples, prob, cap)


def by(kind, step, num_examples, size):
  sample = sample_of(kind, step, num_examples, size)
  return sample.part(0, sample.size)


KINDS = ("poisson", "truncated", "fixed")


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_draw_their_shares_of_one_sample(kind):
  num_examples, size = 346_000_000, 100_000
  whole = by(kind, 1, num_examples, size)
  for hosts in (1, 2, 4, 7):
    sample = sample_of(kind, 1, num_examples, size)
    edges = [sample.size * host // hosts for host in range(hosts + 1)]
    shares = [sample.part(*pair) for pair in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(shares), whole)


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=60)
def test_any_part_is_what_the_whole_holds_there(data, kind):
  num_examples = data.draw(st.integers(1, 60))
  size = data.draw(st.integers(0, num_examples))
  step = data.draw(st.integers(0, 1000))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, "BLOCK", data.draw(st.integers(1, 70)))
    sample = sample_of(kind, step, num_examples, size)
    whole = sample.part(0, sample.size)
    begin = data.draw(st.integers(0, sample.size))
    end = data.draw(st.integers(begin, sample.size))
    part = sample.part(begin, end)
  if kind == "fixed":
    assert len(whole) == size
  if kind == "truncated":
    assert len(whole) <= size
  assert (np.diff(whole) > 0).all()
  np.testing.assert_array_equal(part, whole[begin:end])


@pytest.mark.parametrize("kind", ["truncated", "fixed"])
def test_a_part_kept_across_blocks_is_uniform(kind, monkeypatch):
  """Every subset of 6 over blocks of 4 and 2, as often as it should be."""
  monkeypatch.setattr(sampling, "BLOCK", 4)
  draws = 4000
  found = np.zeros((draws, 6), bool)
  for step in range(draws):
    found[step, by(kind, step, 6, 3)] = True
  observed = np.bincount(found @ (1 << np.arange(6)), minlength=64)
  sizes = np.asarray([int(s).bit_count() for s in range(64)])
  law = stats.binom(6, 0.5)
  chances = {"fixed": [0, 0, 0, 1], "truncated": [*law.pmf([0, 1, 2]), 0]}[kind]
  chances[3] = 1 - sum(chances[:3])
  number = np.bincount(sizes)
  expected = np.array(
    [draws * chances[s] / number[s] if s <= 3 else 0 for s in sizes]
  )
  assert not observed[expected == 0].any()
  taken = expected > 0
  assert stats.chisquare(observed[taken], expected[taken]).pvalue > P


@pytest.mark.parametrize("kind", KINDS)
def test_memory_follows_the_draw_and_not_the_corpus(kind):
  by(kind, 0, 1000, 10)
  for size in (100, 1_000_000):
    tracemalloc.start()
    try:
      by(kind, 2, 10**9, size)
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    assert peak < 2**20 + 64 * size


@pytest.mark.parametrize("places", [(-1, 5), (0, 11), (6, 5)])
def test_refuses_what_is_no_part(places):
  with pytest.raises(ValueError, match="must be places in a sample of 10"):
    fixed_size(key(0), 20, 10).part(*places)
