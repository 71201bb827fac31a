"""N-grams of cluster ids, hashed into table rows without overflow.

With z_t the cluster of token t, K clusters and order n, the n-gram of t is
x = z_t + K z_{t-1} + ... + K^(n-1) z_{t-n+1}, and head i (from 1) looks up row
((x i + i) mod p_i) mod V, where p_i is the i-th prime between V and 2 V.

Source: arXiv 2207.06366 (section 2) and its public form, praxis. That form asks
for int64, which JAX makes int32 unless told otherwise, and x has K^n values.
Here everything is modulo p_i from the start, in uint32, and products are made
of digits that fit.

Shapes: B batch, T length, H heads.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Two numbers below a prime of 31 bits add up within 32.
MOST_ROWS = 2**30


@functools.lru_cache
def primes(table_size: int, count: int) -> tuple[int, ...]:
  """The smallest primes between V and 2 V, both excluded.

  Args:
    table_size: V.
    count: how many, at most.

  Returns:
    Them in ascending order; fewer than `count` if there are no more.

  >>> primes(196_608, 3)
  (196613, 196643, 196657)
  """
  found: list[int] = []
  for number in range(table_size + 1, 2 * table_size):
    if len(found) == count:
      break
    if _is_prime(number):
      found.append(number)
  return tuple(found)


def neighbours(
  ids: jax.Array, segment_ids: jax.Array | None, distance: int
) -> jax.Array:
  """The ids some places to the left (or right, where distance is negative).

  Args:
    ids: [B, T, H] integers.
    segment_ids: [B, T], equal within each segment; None for one segment.
    distance: of the neighbour, not 0.

  Returns:
    [B, T, H]: ids[:, t - distance], and 0 where that is outside of the sequence
    or of t's segment.
  """
  if segment_ids is not None:
    same = segment_ids == _shifted(segment_ids, distance)
    # A segment of number 0 is not what lies outside.
    inside = _shifted(jnp.ones_like(segment_ids), distance) == 1
    return jnp.where((same & inside)[..., None], _shifted(ids, distance), 0)
  return _shifted(ids, distance)


def partners(
  ids: jax.Array,
  attention: jax.Array,
  is_token: jax.Array,
  segment_ids: jax.Array | None = None,
  causal: bool = False,
) -> jax.Array:
  """The id of the token that each token attends to most, itself apart.

  Args:
    ids: [B, T, H] integers.
    attention: [B, H, T, T], of queries (third axis) to keys (last axis).
    is_token: [B, T] bool, False at padding, which is nobody's partner.
    segment_ids: [B, T]; partners are of one segment. None for one segment.
    causal: only earlier tokens are partners.

  Returns:
    [B, T, H]; 0 where there is no partner. Of equal weights the first wins.
  """
  length = ids.shape[1]
  t = jnp.arange(length)
  allowed = is_token[:, None, :] & (t[:, None] != t)
  if causal:
    allowed &= t[:, None] > t
  if segment_ids is not None:
    allowed &= segment_ids[:, :, None] == segment_ids[:, None, :]
  scores = jnp.where(allowed[:, None], attention, -jnp.inf)
  best = jnp.moveaxis(jnp.argmax(scores, axis=-1), 1, 2)
  found = jnp.take_along_axis(ids, best, axis=1)
  return jnp.where(jnp.any(allowed, axis=-1)[..., None], found, 0)


def rows(
  places: Sequence[jax.Array], num_clusters: int, table_size: int
) -> jax.Array:
  """Hashes n-grams into rows of each head's table.

  Args:
    places: [B, T, H] int32 ids in [0, K) of each token, of its nearest
      neighbour, and so on: n of them.
    num_clusters: K.
    table_size: V, at most `MOST_ROWS`, so large that H primes are below 2 V.

  Returns:
    [B, T, H] int32 in [0, V).

  Raises:
    ValueError: the table is too small or too large.
  """
  heads = places[0].shape[-1]
  found = primes(table_size, heads)
  if len(found) < heads or table_size > MOST_ROWS:
    raise ValueError(
      f"table_size={table_size} has no {heads} primes (one per head) between"
      f" itself and its double, or exceeds {MOST_ROWS}; choose another size"
    )
  modulus = np.asarray(found, np.uint32)
  places = [
    jax.lax.rem(
      place.astype(jnp.uint32), jnp.broadcast_to(modulus, place.shape)
    )
    for place in places
  ]
  # Horner's rule, the farthest neighbour first.
  x = places[-1]
  for place in places[-2::-1]:
    x = _plus(_times(x, [num_clusters] * heads, found), place, modulus)
  factors = range(1, heads + 1)
  one = np.ones(heads, np.uint32)
  x = _times(_plus(x, one, modulus), factors, found)
  size = jnp.full(x.shape, table_size, jnp.uint32)
  return jax.lax.rem(x, size).astype(jnp.int32)


def _shifted(x: jax.Array, distance: int) -> jax.Array:
  """x[:, t - distance], 0 outside."""
  length = x.shape[1]
  far = min(abs(distance), length)
  zeros = jnp.zeros((x.shape[0], far, *x.shape[2:]), x.dtype)
  if distance > 0:
    return jnp.concatenate([zeros, x[:, : length - far]], axis=1)
  return jnp.concatenate([x[:, far:], zeros], axis=1)


def _plus(x: jax.Array, y: jax.Array | np.ndarray, p: np.ndarray) -> jax.Array:
  """(x + y) mod p, of uint32 below p < 2^31."""
  return jax.lax.rem(x + y, jnp.broadcast_to(p, x.shape))


def _times(
  x: jax.Array, factors: Sequence[int], primes: Sequence[int]
) -> jax.Array:
  """Products with factors mod p, by digits of these that uint32 has room for.

  Args:
    x: [..., H] uint32, below p.
    factors: H Python ints, at least 0.
    primes: H of them, p < 2^31.
  """
  p = np.asarray(primes, np.uint32)
  factors = [f % q for f, q in zip(factors, primes, strict=True)]
  bits = 32 - max(primes).bit_length()  # of a digit: p * 2^bits <= 2^32
  count = -(-max(factors).bit_length() // bits)
  total = jnp.zeros_like(x)
  for place in reversed(range(count)):
    digits = [(f >> (place * bits)) % 2**bits for f in factors]
    product = x * np.asarray(digits, np.uint32)
    modulus = jnp.broadcast_to(p, x.shape)
    total = jax.lax.rem(total * np.uint32(2**bits), modulus)
    total = _plus(total, jax.lax.rem(product, modulus), p)
  return total


def _is_prime(number: int) -> bool:
  if number < 4 or number % 2 == 0:
    return number in (2, 3)
  return all(number % d for d in range(3, int(number**0.5) + 1, 2))
