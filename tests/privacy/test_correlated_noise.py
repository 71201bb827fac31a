import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.privacy import correlated_noise
from dptrain.privacy import keys
from dptrain.privacy import noise

STEPS = 12


@pytest.fixture(scope="module")
def banded():
  return correlated_noise.BandedNoise(correlated_noise.coefficients(4, STEPS))


def strategy(coefficients):
  """C, float64 [S, S]."""
  matrix = np.zeros((STEPS, STEPS))
  for k, value in enumerate(coefficients):
    matrix += np.diag(np.full(STEPS - k, value), -k)
  return matrix


def at(z, step):
  return jax.tree.map(lambda x: x[step], z)


def stream(banded, z):
  """`next` over the rows of z, a tree of [S, ...]."""
  history = banded.begin(at(z, 0))
  rows = []
  for step in range(STEPS):
    row, history = banded.next(at(z, step), history)
    rows.append(row)
  return jax.tree.map(lambda *xs: np.stack(xs), *rows)


def test_the_stream_is_the_inverse_strategy(banded):
  draw = np.random.default_rng(0)
  z = {
    "a": draw.normal(size=(STEPS, 3, 2)).astype("float32"),
    "b": draw.normal(size=STEPS).astype("float32"),
  }
  found = stream(banded, z)
  for name, rows in z.items():
    expected = np.linalg.solve(
      strategy(banded.coefficients), rows.reshape(STEPS, -1).astype(float)
    )
    np.testing.assert_allclose(
      found[name].reshape(STEPS, -1), expected, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_a_record_meets_orthogonal_columns_of_norm_one(bands):
  found = correlated_noise.coefficients(bands, STEPS)
  assert len(found) == bands
  c = strategy(found)
  assert np.linalg.norm(c, axis=0).max() <= 1 + 1e-12
  for first in range(bands):
    own = c[:, first::bands]
    off = own.T @ own - np.diag(np.diag(own.T @ own))
    np.testing.assert_array_equal(off, 0.0)


def test_one_band_leaves_noise_as_it_is_bit_for_bit():
  key = keys.fixed_seed(0).key("noise", "b", 0)
  tree = {"a": jnp.zeros((5, 7)), "b": jnp.zeros(3)}
  z = noise.gaussian_like(key, tree, 1.0)
  alone = correlated_noise.BandedNoise()
  assert correlated_noise.coefficients(1, 400) == alone.coefficients
  found, _ = jax.jit(alone.next)(z, alone.begin(tree))
  jax.tree.map(np.testing.assert_array_equal, found, z)


def test_sums_of_correlated_noise_are_smaller(banded):
  sums = np.tril(np.ones((STEPS, STEPS)))
  alone = (sums**2).sum()
  together = ((sums @ np.linalg.inv(strategy(banded.coefficients))) ** 2).sum()
  assert together < 0.5 * alone


def test_products_are_not_rounded_as_accelerators_like_to(banded):
  """At a lower precision, C^-1 would depend on the data it hides."""
  like = jax.ShapeDtypeStruct((7,), "float32")
  text = jax.jit(banded.next).lower(like, banded.begin(like)).as_text()
  assert "dot_general" in text
  assert "HIGHEST" in text
  assert "DEFAULT" not in text


def test_no_updates_noise_spreads_further_than_stated(banded):
  rows = np.linalg.inv(strategy(banded.coefficients))
  found = banded.largest_stddev(STEPS)
  assert found == pytest.approx(np.linalg.norm(rows, axis=1).max(), rel=1e-5)
  assert found > 1


@pytest.mark.parametrize(
  "wrong", [(), (0.9, 0.9), (0.0, 1.0), (2.0,), (-1.0,), (float("nan"),)]
)
def test_coefficients_that_break_the_sensitivity_are_refused(wrong):
  with pytest.raises(ValueError, match=r"coefficients=.* (norm|positive)"):
    correlated_noise.BandedNoise(wrong)
