"""AdaGrad: steps divided by the root of the sum of squares (JMLR 12, 2011)."""

import optax

from dptrain.optimizers import second_moments
from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib


def adagrad(
  learning_rate: optax.ScalarOrSchedule,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  decay_norms_and_biases: bool = False,
  correct_noise: bool = False,
  noise_floor: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
  """Builds AdaGrad; each update also multiplies weights by 1 - lr * decay.

  The sum starts at 0: Optax's 0.1, in units of squared gradients, outweighs
  those of a privatised mean over a large batch (1e-12, say) for good. Steps
  shrink as 1 / sqrt(t).

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    eps: added to the root of the second moment; well under the noise per
      coordinate (see `dptrain.optimizers.adamw`).
    weight_decay: decay per unit of learning rate, 0 or more.
    decay_norms_and_biases: decay every parameter, not only matrices.
    correct_noise: subtract what privacy noise adds to the second moment; then
      `update` takes `noise_variance`, as `second_moments.required` says.
    noise_floor: the least second moment, as a share of the noise's, above 0;
      `second_moments.scale_by_second_moment` tells how to choose it.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_weight_decay(weight_decay, learning_rate)
  return optax.chain(
    second_moments.scale_by_second_moment(
      b2=1.0,
      eps=eps,
      debias=False,
      correct_noise=correct_noise,
      noise_floor=noise_floor,
    ),
    optax.add_decayed_weights(
      weight_decay,
      mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
