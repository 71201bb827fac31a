"""Whether arrays are those that were saved, told by four words.

t5x may give back other arrays than a run had: cast to a narrower dtype, or
transformed by a hook. What then repeats an update would meet the same noise
with another gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

WORDS = 4


def fingerprint(tree: Any) -> jax.Array:
  """Sums that depend on every bit of every array and on its place.

  The same on any mesh: sums of 32-bit words wrap around and so do not depend on
  their order. No defence against forgery.

  Args:
    tree: of arrays, typed keys among them.

  Returns:
    uint32 [4].
  """
  total = jnp.zeros(WORDS, jnp.uint32)
  for number, leaf in enumerate(jax.tree.leaves(tree)):
    words = _words(leaf)
    place = jnp.full(words.shape, number, jnp.uint32)
    for axis, length in enumerate(words.shape):
      steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
      place = place * jnp.uint32(length) + steps
    mixed = _mixed(
      words ^ _mixed(place + jnp.uint32(0x9E3779B9 * number % 2**32))
    )
    parts = [
      jnp.sum(_mixed(mixed + jnp.uint32(part)), dtype=jnp.uint32)
      for part in range(WORDS)
    ]
    total += jnp.stack(parts)
  return total


def _words(leaf: Any) -> jax.Array:
  """An array's bits as uint32."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  leaf = jnp.asarray(leaf)
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  narrow = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize)
  if narrow is not None:
    return jax.lax.bitcast_convert_type(leaf, narrow).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit words that spreads every bit (MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
