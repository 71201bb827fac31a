"""Nesterov momentum as a large-batch baseline (arXiv 2102.06356)."""

import optax

from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib


def nesterov(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  decay_norms_and_biases: bool = False,
  decoupled: bool = True,
) -> optax.GradientTransformation:
  """Builds Nesterov momentum: m = momentum m + g; w -= lr (g + momentum m).

  With `decoupled` this is `sgd.sgd(nesterov=True)`. Without, the decay joins
  the gradient before the momentum, as that of an L2 term in the loss would. Do
  not write that term into a private loss: it would be clipped with every
  example and take its share of the norm.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    momentum: decay of the running sum of gradients, in (0, 1). Large batches
      want it tuned, as 1 - momentum on a logarithmic scale.
    weight_decay: decay per unit of learning rate, 0 or more.
    decay_norms_and_biases: decay every parameter, not only matrices.
    decoupled: keep the decay out of the momentum.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_fraction("momentum", momentum)
  settings.check_positive("momentum", momentum)
  settings.check_weight_decay(weight_decay, learning_rate)
  trace = optax.trace(momentum, nesterov=True)
  decay = optax.add_decayed_weights(
    weight_decay,
    mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
  )
  return optax.chain(
    *((trace, decay) if decoupled else (decay, trace)),
    optax.scale_by_learning_rate(learning_rate),
  )
