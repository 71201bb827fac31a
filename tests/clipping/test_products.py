"""Norms and sums of products, against gradients that are formed."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import products

B, S = 2, 2


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def ids_of(seed, rows, vocabulary):
  draws = np.random.default_rng(seed)
  return draws.integers(0, vocabulary, (B, S, rows), np.int32)


def looked_up(ids, gradients, vocabulary):
  """The gradient [B, S, V, d] of the rows that were looked up, by a loop."""
  total = np.zeros((*ids.shape[:2], vocabulary, gradients.shape[-1]))
  for place in np.ndindex(ids.shape):
    total[(*place[:2], ids[place])] += gradients[place]
  return total


def formed(inputs, gradients):
  return np.einsum("bstd,bstp->bsdp", *map(np.float64, (inputs, gradients)))


def squared(gradient):
  return np.square(gradient).sum(axis=(1, 2, 3))


sizes = st.sampled_from([1, 3])
seeds = st.integers(0, 2**16)
quick = settings(max_examples=8, deadline=None)


@quick
@given(seeds, sizes, sizes, sizes)
def test_both_ways_to_the_norm_of_a_product(seed, rows, d, p):
  inputs, gradients = draw(seed, B, S, rows, d), draw(seed + 1, B, S, rows, p)
  expected = squared(formed(inputs, gradients))
  grams = products.gram(inputs), products.gram(gradients)
  for found in (
    products.product_squares(inputs, gradients),
    products.gram_squares(*grams),
    products.squares(inputs, gradients),
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@quick
@given(seeds, sizes, sizes, sizes, sizes)
def test_a_tied_embedding(seed, rows, queries, d, vocabulary):
  ids, g = ids_of(seed, rows, vocabulary), draw(seed + 1, B, S, rows, d)
  q = draw(seed + 2, B, S, queries, d)
  logits = draw(seed + 3, B, S, queries, vocabulary)
  scales = np.abs(draw(seed + 4, B))
  below, above = looked_up(ids, g, vocabulary), formed(logits, q)
  norms = (
    products.lookup_squares(ids, g)
    + 2 * products.lookup_attend_products(ids, g, q, logits)
    + products.gram_squares(products.gram(q), products.gram(logits))
  )
  np.testing.assert_allclose(
    norms, squared(below + above), rtol=1e-4, atol=1e-4
  )
  total = products.weighted_lookup(
    scales, ids, g, vocabulary
  ) + products.weighted_product(scales, logits, q)
  expected = np.einsum("b,bsvd->svd", scales, below + above)
  np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)


@quick
@given(seeds, sizes, sizes, sizes, sizes)
def test_uses_of_one_weight_are_joined(seed, rows, more_rows, d, p):
  shapes = [(rows, d), (more_rows, d), (rows, p), (more_rows, p)]
  a, b, g, h = (draw(seed + i, B, S, *s) for i, s in enumerate(shapes))
  inputs, gradients = products.joined([a, b]), products.joined([g, h])
  expected = squared(formed(a, g) + formed(b, h))
  np.testing.assert_allclose(
    products.squares(inputs, gradients), expected, rtol=1e-4, atol=1e-4
  )


def test_an_id_out_of_range_counts_for_nothing_in_the_sum():
  ids = np.asarray([[[0, 3]]], np.int32)
  g, q = draw(0, 1, 1, 2, 4), draw(1, 1, 1, 2, 4)
  logits = draw(2, 1, 1, 2, 3)
  found = products.lookup_attend_products(ids, g, q, logits)
  only = products.lookup_attend_products(ids[..., :1], g[:, :, :1], q, logits)
  np.testing.assert_allclose(found, only, rtol=1e-5)
  total = products.weighted_lookup(np.ones(1), ids, g, 3)
  np.testing.assert_allclose(total[0, 0], g[0, 0, 0])
  np.testing.assert_array_equal(total[0, 1:], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_at_least_float32(dtype):
  x = jnp.asarray(draw(0, 1, 1, 3, 2), dtype)
  ids = jnp.zeros((1, 1, 3), jnp.int32)
  assert products.squares(x, x).dtype == jnp.float32
  assert products.lookup_squares(ids, x).dtype == jnp.float32
  assert products.weighted_product(jnp.ones(1), x, x).dtype == jnp.float32
  assert products.weighted_lookup(jnp.ones(1), ids, x, 2).dtype == jnp.float32


@pytest.mark.parametrize("away", [1e-2, 1e-3, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("rows", [4, 32])
def test_no_norm_is_lost_to_rounding(rows, away):
  """Rows that nearly cancel: |A^T G| is far below |A| |G|.

  Without a margin, the norm by Gram matrices can come out as 0, and clipping
  would let the gradient pass.
  """
  draws = np.random.default_rng(0)
  many, d, p = 64, 40, 50
  one = draws.standard_normal((many, 1, 1, d))
  inputs = one + away * draws.standard_normal((many, 1, rows, d))
  gradients = draws.standard_normal((many, 1, rows, p))
  gradients -= gradients.mean(axis=2, keepdims=True)
  inputs, gradients = np.float32(inputs), np.float32(gradients)
  truth = np.sqrt(squared(formed(inputs, gradients)))
  grams = products.gram(inputs), products.gram(gradients)
  ids = np.zeros((many, 1, rows), np.int32)
  same_row = np.sqrt(squared(gradients.sum(axis=2, keepdims=True, dtype=float)))
  for norms, expected in (
    (products.gram_squares(*grams), truth),
    (products.product_squares(inputs, gradients), truth),
    (products.lookup_squares(ids, gradients), same_row),
  ):
    assert (np.sqrt(norms) >= expected * (1 - 1e-6)).all()


def test_what_rounding_adds_is_small():
  inputs, gradients = draw(0, 4, 1, 64, 128), draw(1, 4, 1, 64, 128)
  expected = squared(formed(inputs, gradients))
  grams = products.gram(inputs), products.gram(gradients)
  for found in (
    products.gram_squares(*grams),
    products.product_squares(inputs, gradients),
  ):
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    x = np.float64(draw(0, B, S, 6, 3))
    y = np.float64(draw(1, B, S, 6, 4))
    expected = squared(formed(x, y))
    grams = products.gram(jnp.asarray(x)), products.gram(jnp.asarray(y))
    for found in (
      products.gram_squares(*grams),
      products.product_squares(x, y),
    ):
      assert found.dtype == jnp.float64
      np.testing.assert_allclose(found, expected, rtol=1e-12)
