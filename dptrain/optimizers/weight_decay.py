"""Which parameters weight decay applies to.

The rule goes by name, not by rank alone: a model that stacks its layers holds
biases and LayerNorm scales as matrices [layers, ...], and attention biases are
[heads, size] even unstacked.
"""

from typing import Any

import jax

_NEVER = ("bias", "scale")


def decayed(params: Any) -> Any:
  """Marks the parameters that decay: matrices, not biases or norm scales.

  Pass the function itself as an Optax `mask`. A mask evaluated beforehand is a
  plain dict, which does not match parameters kept in a FrozenDict.

  Args:
    params: a pytree of arrays whose innermost names are Flax's: "kernel",
      "embedding", "bias", "scale".

  Returns:
    A pytree of bools of the same structure: True for arrays of two or more
    dimensions not named "bias" or "scale".

  >>> import jax.numpy as jnp
  >>> decayed({"kernel": jnp.ones((2, 2)), "bias": jnp.ones((3, 2))})
  {'bias': False, 'kernel': True}
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim >= 2 and _name(path) not in _NEVER, params
  )


def _name(path: tuple[Any, ...]) -> str:
  """Returns the innermost name on a path, or "" for a bare array."""
  return jax.tree_util.keystr(path[-1:], simple=True)
