"""LARS: momentum with a learning rate per layer (arXiv 1708.03888)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import layers
from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib


def lars(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  decay_norms_and_biases: bool = False,
  adapt_norms_and_biases: bool = False,
  stacked: str | None = layers.STACKED,
) -> optax.GradientTransformation:
  """Builds LARS: each layer's gradient is scaled, then enters the momentum.

  A layer with weights w, gradient g and decay d gets the gradient
  c |w| / (|g| + d |w|) * (g + d w), c the trust coefficient. The momentum is
  one of steps, with the learning rate in it, as in the paper.

  It differs from `optax.lars` in three things: that divides by |g + d w|; it
  adapts biases and norm scales, too, unless given a mask (a bias starts at 0,
  and a share of its norm leaves it there); and layers that are stacked for a
  scan share one norm there.

  Noise counts in |g| like gradient: a layer of n coordinates under noise of
  standard deviation s has |g| of at least s sqrt(n), about. Tuned Nesterov
  momentum matches LARS on ResNet-50 at a batch of 32,768 (arXiv 2102.06356), so
  take it as a baseline.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    momentum: decay of the running sum of steps, in [0, 1); 0 keeps none.
    trust_coefficient: c, above 0.
    nesterov: look one momentum step ahead.
    weight_decay: d, 0 or more. It is part of the scaled gradient: a layer
      without gradient shrinks by lr * c per update, whatever d.
    decay_norms_and_biases: decay every parameter, not only matrices.
    adapt_norms_and_biases: scale every parameter's gradient.
    stacked: the name below which arrays are stacks of layers; None: nothing is.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_fraction("momentum", momentum)
  settings.check_positive("trust_coefficient", trust_coefficient)
  settings.check_weight_decay(weight_decay)
  settings.check_nesterov(nesterov, momentum)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    settings.check_params(params)
    matrices = weight_decay_lib.decayed(params)
    every = jax.tree.map(lambda _: True, params)

    def scaled(
      g: jax.Array, w: jax.Array, decays: bool, adapts: bool, *norms: jax.Array
    ) -> jax.Array:
      g_norm, w_norm = norms
      decay = weight_decay if decays else 0.0
      whole = g + decay * w
      if not adapts:
        return whole.astype(g.dtype)
      below = g_norm + decay * w_norm
      usable = (w_norm > 0) & (below > 0)
      share = trust_coefficient * w_norm / jnp.where(usable, below, 1.0)
      rate = jnp.where(usable, share, 1.0)
      return (rate * whole).astype(g.dtype)

    return jax.tree.map(
      scaled,
      updates,
      params,
      every if decay_norms_and_biases else matrices,
      every if adapt_norms_and_biases else matrices,
      layers.norms(updates, stacked),
      layers.norms(params, stacked),
    ), state

  return optax.chain(
    optax.GradientTransformation(optax.init_empty_state, update),
    optax.scale_by_learning_rate(learning_rate),
    optax.trace(momentum, nesterov) if momentum else optax.identity(),
  )
