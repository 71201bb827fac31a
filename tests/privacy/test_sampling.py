import itertools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from scipy import stats

from dptrain.privacy import keys
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


@pytest.fixture(scope="module")
def table():
  return memberships(12, 0.3, 4000, "many")


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


def test_every_subset_has_the_probability_of_independent_coins():
  # The whole law at once: 16 subsets of 4 examples.
  members = memberships(4, 0.4, 3000, "subsets")
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
