"""Adam with decoupled weight decay (arXiv 1412.6980, arXiv 1711.05101)."""

import optax

from dptrain.optimizers import second_moments
from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.5,
  decay_norms_and_biases: bool = False,
  correct_noise: bool = False,
  noise_floor: float = 0.1,
) -> optax.GradientTransformation:
  """Builds AdamW; each update also multiplies weights by 1 - lr * decay.

  Private training wants a far larger `weight_decay` than the usual 0.01 (arXiv
  2108.01624 names it as what makes Adam work; its replication in arXiv
  2211.02956 uses 0.5). A weight that feeds a LayerNorm is scale-invariant: the
  loss ignores its norm, and its gradient shrinks as 1 / norm. Noise does not
  shrink and points nowhere in particular, so it only adds to the norm, which
  grows like the square root of the number of updates while the signal under
  the same noise falls. Decay is what holds the norm down; useful values lie
  around 0.5 to 1.0.

  With `correct_noise` this is DP-AdamBC (arXiv 2312.14334): the noise's share
  phi of the second moment v is subtracted after both were divided by what their
  weights add up to, and the divisor is sqrt(max(v - phi, noise_floor * phi)) +
  eps. There phi is a constant; here it is averaged as v is, so that it stays
  right while batch sizes or clip norms change. Where noise outweighs the signal
  nearly everywhere, as in pretraining, nearly all coordinates are at the floor,
  and the result is momentum in units of the noise.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    b1: decay of the mean of gradients, in [0, 1).
    b2: decay of the mean of squared gradients, in [0, 1).
    eps: added to the root of the second moment. It must lie well under the
      noise per coordinate (noise multiplier * clip norm / batch size, such as
      1e-6 at clip norm 1), or Adam turns into plain momentum: lower it if you
      clip to a small norm and do not rescale.
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
  settings.check_fraction("b1", b1)
  settings.check_fraction("b2", b2)
  settings.check_positive("eps", eps)
  settings.check_weight_decay(weight_decay, learning_rate)
  settings.check_positive("noise_floor", noise_floor)
  mask = None if decay_norms_and_biases else weight_decay_lib.decayed
  if correct_noise:
    return optax.chain(
      second_moments.scale_by_second_moment(
        b1, b2, eps, correct_noise=True, noise_floor=noise_floor
      ),
      optax.add_decayed_weights(weight_decay, mask=mask),
      optax.scale_by_learning_rate(learning_rate),
    )
  return optax.adamw(
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
  )
