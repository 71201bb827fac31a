"""Step sizes that adapt by exponentiated gradients, around any optimizer.

arXiv 2202.00145: an optimizer's step u is taken as s * p * u, with one scale s
for all and a gain p for each coordinate. Where the gradient g agrees with the
average a of those before it, steps were too short; where it disagrees, too
long. Both are moved by factors, not by terms:

  s *= exp(scale_rate * cos(a, g))
  p *= exp(gain_rate * clip(a g / (rms(a) rms(g)), -1, 1))     per coordinate

with rms per layer, then kept within limits. That agreement of average and
current gradient drives both, and that updates are multiplicative, is the
paper's; its normalisation of gains, its constants and limits were not at hand,
and those here are ours.

Under privacy noise. Noise of different updates is independent, so that it adds
nothing to the inner product of a and g in expectation, only to their norms: the
scale still learns, more slowly by the share that noise has in both norms. A
gain sees one coordinate, where noise usually is all there is, and walks about
at random; hence gains are off unless asked for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import layers
from dptrain.optimizers import settings


class StepSizeState(NamedTuple):
  """State of `adapt_step_size`.

  Attributes:
    inner: of the optimizer within.
    average: of past gradients, at least float32.
    scale: float32 scalar s.
    gains: p, of the parameters' shapes; empty if `gain_rate` is 0.
  """

  inner: Any
  average: Any
  scale: jax.Array
  gains: Any


def adapt_step_size(
  inner: optax.GradientTransformation,
  scale_rate: float = 0.01,
  gain_rate: float = 0.0,
  decay: float = 0.9,
  scale_limits: tuple[float, float] = (0.01, 100.0),
  gain_limits: tuple[float, float] = (0.1, 10.0),
  stacked: str | None = layers.STACKED,
) -> optax.GradientTransformationExtraArgs:
  """Multiplies an optimizer's steps by factors that learn (arXiv 2202.00145).

  Give `inner` a constant learning rate, after a warm-up at most, and no weight
  decay, which would be scaled with the steps: put `weight_decay.with_decay`
  around the whole.

  Args:
    inner: any Optax transformation.
    scale_rate: the most that log s moves in one update, 0 or more.
    gain_rate: the most that log p moves in one update, 0 or more; 0 keeps no
      gains and their memory.
    decay: of the average of gradients, in [0, 1); 0 compares with the last one.
    scale_limits: least and greatest s, around 1.
    gain_limits: least and greatest p, around 1.
    stacked: the name below which arrays are stacks of layers, each with an rms
      of its own; None: nothing is.

  Returns:
    An Optax transformation; extra arguments reach `inner`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_not_negative("scale_rate", scale_rate)
  settings.check_not_negative("gain_rate", gain_rate)
  settings.check_fraction("decay", decay)
  settings.check_limits("scale_limits", scale_limits)
  settings.check_limits("gain_limits", gain_limits)
  optimizer = optax.with_extra_args_support(inner)

  def init(params: Any) -> StepSizeState:
    def full(value: float) -> Any:
      return jax.tree.map(
        lambda p: jnp.full(
          p.shape, value, jnp.promote_types(p.dtype, jnp.float32)
        ),
        params,
      )

    return StepSizeState(
      optimizer.init(params),
      full(0.0),
      jnp.ones((), jnp.float32),
      full(1.0) if gain_rate else optax.EmptyState(),
    )

  def update(
    gradients: Any, state: StepSizeState, params: Any = None, **extra: Any
  ) -> tuple[Any, StepSizeState]:
    steps, kept = optimizer.update(gradients, state.inner, params, **extra)
    wide = jax.tree.map(
      lambda g, a: g.astype(a.dtype), gradients, state.average
    )
    agreement = _cosine(state.average, wide)
    scale = _moved(state.scale, scale_rate * agreement, scale_limits)
    gains = state.gains
    if gain_rate:
      agreements = jax.tree.map(
        lambda a, g: gain_rate * jnp.clip(a * g, -1.0, 1.0),
        _of_rms_one(state.average, stacked),
        _of_rms_one(wide, stacked),
      )
      gains = jax.tree.map(
        lambda p, e: _moved(p, e, gain_limits), gains, agreements
      )
      steps = jax.tree.map(lambda u, p: (u * p).astype(u.dtype), steps, gains)
    steps = jax.tree.map(lambda u: (u * scale).astype(u.dtype), steps)
    average = jax.tree.map(
      lambda a, g: decay * a + (1.0 - decay) * g, state.average, wide
    )
    return steps, StepSizeState(kept, average, scale, gains)

  return optax.GradientTransformationExtraArgs(init, update)


def _moved(
  factor: jax.Array, exponent: jax.Array, limits: tuple[float, float]
) -> jax.Array:
  """A factor times the exponential, within limits."""
  return jnp.clip(factor * jnp.exp(exponent), *limits).astype(factor.dtype)


def _divided(tree: Any, norms: Any) -> Any:
  """Arrays over their norms; 0 where those are 0."""
  return jax.tree.map(lambda x, n: x / jnp.where(n > 0, n, 1.0), tree, norms)


def _cosine(a: Any, b: Any) -> jax.Array:
  """Of the angle between two trees as vectors; 0 if either is 0."""
  units = [
    _divided(tree, jax.tree.map(lambda _, n=norm: n, tree))
    for tree, norm in ((a, layers.global_norm(a)), (b, layers.global_norm(b)))
  ]
  products = jax.tree.map(lambda x, y: jnp.sum(x * y), *units)
  return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


def _of_rms_one(tree: Any, stacked: str | None) -> Any:
  """Arrays whose mean square per layer is 1; 0 where all is 0."""
  return jax.tree.map(
    lambda x, n: x * jnp.sqrt(x.size / n.size),
    _divided(tree, layers.norms(tree, stacked)),
    layers.norms(tree, stacked),
  )
