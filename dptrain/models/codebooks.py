"""Codebooks: to which centre a vector belongs, and how centres learn of it.

A codebook of one head is a table [K, S + 1] whose row k is the centre of
cluster k and, last, its mass (a running mean of counts; the model never reads
it). It is read in two ways: assignment compares with all centres, behind
`stop_gradient`, and what each token is assigned to is looked up as in any
embedding.

What an example tells a codebook is the gradient of a term that is linear in the
rows it looks up: with z_t the cluster of token t, the gradient of
sum_t <u_t, row z_t> by the table is sum_t onehot(z_t) u_t^T, its sums and
counts by cluster when u_t = (x_t, 1). So it is a part of the example's
gradient like any other: clipped with it, noised with it, and of no more rows
than the example has tokens (`clipping.products.lookup_squares`).

Shapes: B batch, T length, H heads, S head size, K clusters.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp


def nearest(x: jax.Array, centres: Sequence[jax.Array]) -> jax.Array:
  """Assigns each head's vectors to the nearest of that head's centres.

  Args:
    x: [..., H, S]; no gradient flows back.
    centres: H arrays [K, S].

  Returns:
    [..., H] int32; of equally near centres the first.
  """
  x = jax.lax.stop_gradient(x)
  ids = []
  for head, centre in enumerate(centres):
    # |x - c|^2 but for |x|^2, which all centres share. In full precision: what
    # TF32 rounds away would choose otherwise in another program.
    products = jnp.matmul(
      x[..., head, :], centre.T, precision=jax.lax.Precision.HIGHEST
    )
    distances = jnp.sum(jnp.square(centre), axis=-1) - 2 * products
    ids.append(jnp.argmin(distances, axis=-1).astype(jnp.int32))
  return jnp.stack(ids, axis=-1)


def sums_and_counts(
  x: jax.Array, rows: jax.Array, is_token: jax.Array, deviation_scale: float
) -> jax.Array:
  """A term whose gradient by codebooks is an example's sums and counts.

  u = [(x - c) / deviation_scale, 1] / (n sqrt(H)) for each of n real tokens and
  each head. Deviations from the centre c rather than vectors: where centres are
  right already, they take no room under the clip norm. The counts of all heads
  together have a norm of at most 1.

  Args:
    x: [B, T, H, S] what was assigned.
    rows: [B, T, H, S + 1] what the codebooks' layers returned for it.
    is_token: [B, T] bool, False at padding, which counts nowhere.
    deviation_scale: how long a deviation counts as much as the token.

  Returns:
    [B], whose value means nothing. Gradient flows to `rows` only.
  """
  tokens = jnp.sum(is_token, axis=1)
  deviations = (x - rows[..., :-1]) / deviation_scale
  ones = jnp.ones_like(deviations[..., :1])
  told = jnp.concatenate([deviations, ones], axis=-1)
  told = jnp.where(is_token[..., None, None], told, 0.0)
  share = 1.0 / (jnp.maximum(tokens, 1) * math.sqrt(x.shape[2]))
  told = jax.lax.stop_gradient(told * share[:, None, None, None])
  return jnp.sum(told * rows, axis=(1, 2, 3))


def quantization_loss(
  x: jax.Array,
  rows: jax.Array,
  is_token: jax.Array,
  weight: float,
  commitment: float,
) -> jax.Array:
  """Squared distances: centres learn from vectors, and vectors from centres.

  Source: arXiv 1711.00937 (section 3.2), means over real tokens and heads.

  Args:
    x: [B, T, H, S] what was assigned.
    rows: [B, T, H, S + 1] what the codebooks' layers returned for it.
    is_token: [B, T] bool, False at padding.
    weight: of |stop_gradient(x) - c|^2.
    commitment: of |x - stop_gradient(c)|^2.

  Returns:
    [B].
  """
  centres = rows[..., :-1]
  fixed_x, fixed = jax.lax.stop_gradient((x, centres))
  squares = weight * jnp.sum(jnp.square(fixed_x - centres), axis=-1)
  squares += commitment * jnp.sum(jnp.square(x - fixed), axis=-1)
  squares = jnp.where(is_token[..., None], squares, 0.0)
  tokens = jnp.maximum(jnp.sum(is_token, axis=1), 1)
  return jnp.sum(squares, axis=(1, 2)) / (tokens * x.shape[2])


def row_counts(places: jax.Array, is_token: jax.Array) -> jax.Array:
  """A term whose gradient by a table's last column counts its rows' lookups.

  Each of an example's lookups counts 1 / sqrt(their number), so that the counts
  of lookups that do not collide have norm 1.

  Args:
    places: [B, T, L] the last column of what each of L lookups returned.
    is_token: [B, T] bool, False at padding, which counts nowhere.

  Returns:
    [B].
  """
  number = jnp.maximum(jnp.sum(is_token, axis=1), 1) * places.shape[2]
  total = jnp.sum(jnp.where(is_token[..., None], places, 0.0), axis=(1, 2))
  return total / jnp.sqrt(number.astype(total.dtype))
