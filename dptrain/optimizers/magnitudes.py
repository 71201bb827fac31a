"""Updates whose length a preconditioned direction may take over, by name.

arXiv 2002.11803 is the source of grafting: one optimizer's length per layer,
another's direction. These are the second-moment parts of well-known optimizers,
without momentum and learning rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import second_moments

NAMES = (
  "sgd",
  "adagrad",
  "adagrad_normalized",
  "rmsprop",
  "rmsprop_normalized",
  "adam",
  "sqrt_n",
)


def named(name: str, b2: float, eps: float) -> optax.GradientTransformation:
  """An update by its name, not negated and not scaled by a learning rate.

  "sgd" is the gradient; "sqrt_n" its sign, of length sqrt(number of
  coordinates); "adagrad", "rmsprop" and "adam" divide by the root of the sum,
  the average and the debiased average of squares
  (`second_moments.scale_by_second_moment`). The "..._normalized" ones do so
  with a gradient that the caller has brought to length 1 per layer
  (`is_normalized`).

  Args:
    name: one of `NAMES`.
    b2: decay of the average of squares, in [0, 1).
    eps: added to the root.

  Raises:
    ValueError: the name is unknown.
  """
  base = name.removesuffix("_normalized")
  if name not in NAMES:
    raise ValueError(f"graft={name!r} must be one of {NAMES}, or None")
  if base == "sgd":
    return optax.identity()
  if base == "sqrt_n":
    return optax.stateless(lambda g, _: jax.tree.map(jnp.sign, g))
  return second_moments.scale_by_second_moment(
    b2=1.0 if base == "adagrad" else b2, eps=eps, debias=base == "adam"
  )


def is_normalized(graft: Any) -> bool:
  """Whether the gradient must have length 1 per layer first."""
  return isinstance(graft, str) and graft.endswith("_normalized")


def length(x: jax.Array, stacked: int) -> jax.Array:
  """Euclidean norm of each of the stacked tensors, dimensions kept.

  Args:
    x: [*stacked, ...].
    stacked: leading dimensions that number tensors.
  """
  axes = tuple(range(stacked, x.ndim))
  # Squares of numbers below 1e-19 would vanish in float32.
  top = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
  safe = jnp.where(top > 0.0, top, 1.0)
  return top * jnp.sqrt(jnp.sum((x / safe) ** 2, axis=axes, keepdims=True))


def normalized(x: jax.Array, stacked: int) -> jax.Array:
  """Each of the stacked tensors at length 1; 0 stays 0."""
  own = length(x, stacked)
  return x / jnp.where(own > 0.0, own, 1.0)


def with_length(
  magnitude: jax.Array, direction: jax.Array, stacked: int
) -> jax.Array:
  """The direction, at the magnitude's length; 0 where the direction is 0."""
  return normalized(direction, stacked) * length(magnitude, stacked)
