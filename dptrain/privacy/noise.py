"""Gaussian noise for a tree of arrays."""

from typing import Any

import jax
import jax.numpy as jnp


def gaussian_like(key: jax.Array, tree: Any, stddev: jax.Array | float) -> Any:
  """Independent float32 N(0, stddev^2) for every coordinate of `tree`.

  Each leaf has a key of its own; within a leaf jax's partitionable threefry
  gives the same values whatever the sharding.

  Formal guarantee: added once to a sum whose L2 sensitivity is s, with
  `stddev = noise_multiplier * s`, this is the Gaussian mechanism that
  `GaussianDpEvent(noise_multiplier)` prices, up to the rounding of float32
  (docs/pitfalls.md). `key` must be secret and used for nothing else.

  Args:
    key: typed key.
    tree: arrays of any shape; only shapes are read.
    stddev: scalar, in the units of the sum.

  Returns:
    A tree of float32 arrays of the same shapes. Float64 leaves get float64.
  """
  leaves, treedef = jax.tree.flatten(tree)
  noise = [
    stddev
    * jax.random.normal(
      jax.random.fold_in(key, index),
      leaf.shape,
      jnp.promote_types(leaf.dtype, jnp.float32),
    )
    for index, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, noise)
