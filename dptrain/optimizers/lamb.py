"""LAMB: Adam's steps, each layer's scaled to its weights (arXiv 1904.00962)."""

from typing import Any

import jax
import optax

from dptrain.optimizers import layers
from dptrain.optimizers import second_moments
from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib


def lamb(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  decay_norms_and_biases: bool = False,
  adapt_norms_and_biases: bool = False,
  correct_noise: bool = False,
  noise_floor: float = 0.1,
  stacked: str | None = layers.STACKED,
) -> optax.GradientTransformation:
  """Builds LAMB: u = Adam's step + decay * w, then w -= lr * |w| / |u| * u.

  The learning rate is the share of its norm by which a layer moves, whatever
  its gradient. The decay only turns the step: without any gradient a layer
  shrinks by lr per update, however small the decay.

  It differs from `optax.lamb` in two things. Biases and norm scales get Adam's
  step as it is: a bias starts at 0, and a share of its norm leaves it there
  (Optax excludes them from decay only, and only where given a mask). And layers
  that are stacked for a scan have a norm each.

  Tuned Adam matches LAMB on BERT at batches of 32,768 and 65,536 (arXiv
  2102.06356), so take it as a baseline.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    b1: decay of the mean of gradients, in [0, 1).
    b2: decay of the mean of squared gradients, in [0, 1).
    eps: added to the root of the second moment; well under the noise per
      coordinate (see `dptrain.optimizers.adamw`). The paper's 1e-6 is not.
    weight_decay: decay per unit of learning rate, 0 or more, before scaling.
    decay_norms_and_biases: decay every parameter, not only matrices.
    adapt_norms_and_biases: scale every parameter's step.
    correct_noise: subtract what privacy noise adds to the second moment; then
      `update` takes `noise_variance`, as `second_moments.required` says.
    noise_floor: the least second moment, as a share of the noise's, above 0;
      `second_moments.scale_by_second_moment` tells how to choose it.
    stacked: the name below which arrays are stacks of layers; None: nothing is.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_fraction("b2", b2)
  settings.check_weight_decay(weight_decay)
  return optax.chain(
    second_moments.scale_by_second_moment(
      b1, b2, eps, correct_noise=correct_noise, noise_floor=noise_floor
    ),
    optax.add_decayed_weights(
      weight_decay,
      mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
    ),
    _scale_by_trust_ratio(adapt_norms_and_biases, stacked),
    optax.scale_by_learning_rate(learning_rate),
  )


def _scale_by_trust_ratio(
  every_parameter: bool, stacked: str | None
) -> optax.GradientTransformation:
  """Gives each layer's step the norm of its weights."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    settings.check_params(params)
    adapts = weight_decay_lib.decayed(params)
    if every_parameter:
      adapts = jax.tree.map(lambda _: True, params)
    ratios = layers.trust_ratios(params, updates, adapts, stacked)
    return jax.tree.map(
      lambda u, r: (u * r).astype(u.dtype), updates, ratios
    ), state

  return optax.GradientTransformation(optax.init_empty_state, update)
