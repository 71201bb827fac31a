"""Norms and weighted sums of gradients that are products of activations.

Shapes: B batch, S stacked layers, T rows of one example, d and p widths of the
weight, V vocabulary, M rows that meet the transposed weight.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Below it, TF32 or bfloat16 products would let a norm come out too small.
_EXACT = jax.lax.Precision.HIGHEST


def gram(x: jax.Array) -> jax.Array:
  """Inner products of each example's rows: [B, S, T, d] -> [B, S, T, T]."""
  x = _wide(x)
  return jnp.einsum("bstd,bsud->bstu", x, x, precision=_EXACT)


def prefers_gram(rows: int, d: int, p: int) -> bool:
  """Whether two Gram matrices cost less than the product A^T G itself.

  Source: arXiv 2205.10683 (mixed ghost norm), counting multiplications.
  """
  return rows * (d + p) < d * p


def product_squares(inputs: jax.Array, gradients: jax.Array) -> jax.Array:
  """Squared norms of A^T G, formed: [B, S, T, d], [B, S, T, p] -> [B]."""
  product = jnp.einsum(
    "bstd,bstp->bsdp", _wide(inputs), _wide(gradients), precision=_EXACT
  )
  norms = jnp.sqrt(jnp.sum(jnp.square(product), axis=(2, 3)))
  terms = jnp.sum(_row_norms(inputs) * _row_norms(gradients), axis=2)
  return jnp.sum(jnp.square(norms + _rounding(norms) * terms), axis=1)


def gram_squares(left: jax.Array, right: jax.Array) -> jax.Array:
  """Squared norms of A^T G from A A^T and G G^T [B, S, T, T]: [B].

  |A^T G|^2 = sum of the entries of (A A^T) * (G G^T) (arXiv 2110.05679).
  """
  found = jnp.maximum(jnp.sum(left * right, axis=(2, 3)), 0.0)
  diagonals = [jnp.diagonal(x, axis1=2, axis2=3) for x in (left, right)]
  terms = jnp.sum(jnp.sqrt(diagonals[0] * diagonals[1]), axis=2)
  return jnp.sum(found + _rounding(found) * jnp.square(terms), axis=1)


def squares(inputs: jax.Array, gradients: jax.Array) -> jax.Array:
  """Squared norms of A^T G, the cheaper way: [B]."""
  if prefers_gram(inputs.shape[2], inputs.shape[3], gradients.shape[3]):
    return gram_squares(gram(inputs), gram(gradients))
  return product_squares(inputs, gradients)


def lookup_squares(ids: jax.Array, gradients: jax.Array) -> jax.Array:
  """Squared norms of the gradient of looked-up rows.

  Args:
    ids: [B, S, T] int32.
    gradients: [B, S, T, d] at the rows that came out.

  Returns:
    [B].
  """
  same = ids[..., :, None] == ids[..., None, :]
  products = gram(gradients)
  norms = jnp.sqrt(jnp.diagonal(products, axis1=2, axis2=3))
  terms = norms[..., :, None] * norms[..., None, :]
  total = products + _rounding(products) * terms
  found = jnp.sum(jnp.where(same, total, 0.0), axis=(1, 2, 3))
  return jnp.maximum(found, 0.0)


def lookup_attend_products(
  ids: jax.Array,
  gradients: jax.Array,
  queries: jax.Array,
  logit_gradients: jax.Array,
) -> jax.Array:
  """Inner products of the two parts of a tied embedding's gradient.

  Args:
    ids: [B, S, T] int32.
    gradients: [B, S, T, d].
    queries: [B, S, M, d].
    logit_gradients: [B, S, M, V].

  Returns:
    [B]: sum over t, m of logit_gradients[m, ids[t]] * (queries G^T)[m, t].
  """
  # An id that is out of range has no logit: it must not pick nan.
  picked = _wide(
    jnp.take_along_axis(
      logit_gradients,
      jnp.expand_dims(ids, 2),
      axis=3,
      mode="fill",
      fill_value=0,
    )
  )
  crossed = jnp.einsum(
    "bsmd,bstd->bsmt", _wide(queries), _wide(gradients), precision=_EXACT
  )
  terms = (
    _row_norms(queries)[..., :, None] * _row_norms(gradients)[..., None, :]
  )
  total = picked * crossed + _rounding(crossed) * jnp.abs(picked) * terms
  return jnp.sum(total, axis=(1, 2, 3))


def weighted_product(
  scales: jax.Array, inputs: jax.Array, gradients: jax.Array
) -> jax.Array:
  """Sum over examples of scale * A^T G: [S, d, p]."""
  inputs, gradients = _wide(inputs), _wide(gradients)
  weights = scales.reshape(-1, 1, 1, 1).astype(inputs.dtype)
  if inputs.shape[-1] <= gradients.shape[-1]:
    inputs = inputs * weights
  else:
    gradients = gradients * weights
  return jnp.einsum("bstd,bstp->sdp", inputs, gradients, precision=_EXACT)


def weighted_lookup(
  scales: jax.Array, ids: jax.Array, gradients: jax.Array, rows: int
) -> jax.Array:
  """Sum over examples of the scaled gradient of looked-up rows: [S, V, d]."""
  gradients = _wide(gradients)
  weighted = gradients * scales.reshape(-1, 1, 1, 1).astype(gradients.dtype)

  def one(ids: jax.Array, weighted: jax.Array) -> jax.Array:
    zeros = jnp.zeros((rows, weighted.shape[-1]), weighted.dtype)
    return zeros.at[ids.reshape(-1)].add(
      weighted.reshape(-1, weighted.shape[-1])
    )

  return jax.vmap(one, in_axes=1)(ids, weighted)


def joined(parts: Sequence[jax.Array]) -> jax.Array:
  """Rows of several uses of one weight, as if they had been one use."""
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def _row_norms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(_wide(x)), axis=-1))


def _rounding(x: jax.Array) -> jax.Array:
  """What a norm is lengthened by, relative to the terms that it sums.

  Where these cancel, rounding would be most of what is left: without it, a norm
  could come out as 0.
  """
  return jnp.asarray(jnp.finfo(x.dtype).eps, x.dtype)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
