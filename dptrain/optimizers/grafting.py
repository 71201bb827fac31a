"""Grafting: the length of one optimizer's step, the direction of another's.

arXiv 2002.11803: two optimizers see the same gradients, each with a state of
its own; each layer moves in D's direction by the length of M's step. What a
learning-rate schedule tuned for M does is thereby handed to D.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import layers

PER = ("layer", "global")


class GraftState(NamedTuple):
  """State of `graft`.

  Attributes:
    magnitude: state of the transformation that gives the lengths.
    direction: state of the one that gives the directions.
  """

  magnitude: Any
  direction: Any


def graft(
  magnitude: optax.GradientTransformation,
  direction: optax.GradientTransformation,
  per: str = "layer",
  stacked: str | None = layers.STACKED,
) -> optax.GradientTransformationExtraArgs:
  """Steps as long as `magnitude`'s in the direction of `direction`'s.

  Optimizers are grafted with their learning rates; D's cancels. They should
  have no weight decay of their own, which would become part of a length or of
  a direction: put `weight_decay.with_decay` around the graft.

  Args:
    magnitude: M, any Optax transformation.
    direction: D, any Optax transformation.
    per: "layer": each array has a length of its own; "global": all together
      have one.
    stacked: the name below which arrays are stacks of layers with a length
      each; None: nothing is.

  Returns:
    An Optax transformation whose updates have M's norm and D's direction; 0
    where either's norm is 0. Extra arguments reach both.

  Raises:
    ValueError: `per` is unknown.

  >>> both = graft(optax.sgd(0.1), optax.sign_sgd(1.0))
  >>> weights = jnp.zeros(2)
  >>> updates, _ = both.update(jnp.array([3.0, 4.0]), both.init(weights))
  >>> [round(float(u), 4) for u in updates]  # 0.1 * 5 along -(1, 1) / sqrt(2)
  [-0.3536, -0.3536]
  """
  if per not in PER:
    raise ValueError(f"per={per!r} is unknown; use one of {PER}")
  measured = optax.with_extra_args_support(magnitude)
  pointed = optax.with_extra_args_support(direction)

  def norms(tree: Any) -> Any:
    if per == "layer":
      return layers.norms(tree, stacked)
    norm = layers.global_norm(tree)
    return jax.tree.map(lambda _: norm, tree)

  def init(params: Any) -> GraftState:
    return GraftState(measured.init(params), pointed.init(params))

  def update(
    gradients: Any, state: GraftState, params: Any = None, **extra: Any
  ) -> tuple[Any, GraftState]:
    lengths, kept = measured.update(gradients, state.magnitude, params, **extra)
    steps, own = pointed.update(gradients, state.direction, params, **extra)
    updates = jax.tree.map(_of_length, steps, norms(lengths), norms(steps))
    return updates, GraftState(kept, own)

  return optax.GradientTransformationExtraArgs(init, update)


def _of_length(step: jax.Array, wanted: jax.Array, found: jax.Array) -> Any:
  """A step of norm `found` made one of norm `wanted`; 0 stays 0."""
  # Divided first: the ratio of a long step to a tiny one leaves float32.
  unit = step.astype(found.dtype) / jnp.where(found > 0, found, 1.0)
  return (unit * wanted).astype(step.dtype)
