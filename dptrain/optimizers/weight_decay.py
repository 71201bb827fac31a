"""Which parameters weight decay applies to, and decay for any optimizer.

The rule goes by name, not by rank alone: a model that stacks its layers holds
biases and LayerNorm scales as matrices [layers, ...], and attention biases are
[heads, size] even unstacked.
"""

from typing import Any

import jax
import optax

from dptrain.optimizers import settings

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


def with_decay(
  optimizer: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
  decay_norms_and_biases: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Adds decoupled weight decay behind an optimizer that has none.

  For combinations whose parts must not decay by themselves: a decay within a
  grafted optimizer becomes a part of its length or of its direction.

  Args:
    optimizer: any, with its own learning rate and without decay.
    learning_rate: the same number or schedule as that of `optimizer`.
    weight_decay: decay per unit of learning rate, 0 or more.
    decay_norms_and_biases: decay every parameter, not only matrices.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_weight_decay(weight_decay, learning_rate)
  rate = learning_rate
  return optax.chain(
    optax.with_extra_args_support(optimizer),
    optax.add_decayed_weights(
      (lambda count: -rate(count) * weight_decay)
      if callable(rate)
      else -rate * weight_decay,
      mask=None if decay_norms_and_biases else decayed,
    ),
  )


def _name(path: tuple[Any, ...]) -> str:
  """Returns the innermost name on a path, or "" for a bare array."""
  return jax.tree_util.keystr(path[-1:], simple=True)
