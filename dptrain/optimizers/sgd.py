"""Gradient descent with momentum and decoupled weight decay."""

import optax

from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  decay_norms_and_biases: bool = False,
) -> optax.GradientTransformation:
  """Builds SGD; each update also multiplies weights by 1 - lr * decay.

  The decay is decoupled (arXiv 1711.05101): it bypasses the momentum buffer.
  Why private training needs it is told at `dptrain.optimizers.adamw`; the
  useful values differ, since only learning_rate * weight_decay matters and SGD
  runs at other learning rates.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    momentum: decay of the running sum of gradients, in [0, 1); 0 keeps none.
    nesterov: look one momentum step ahead.
    weight_decay: decay per unit of learning rate, 0 or more.
    decay_norms_and_biases: decay every parameter, not only matrices.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_fraction("momentum", momentum)
  settings.check_weight_decay(weight_decay, learning_rate)
  settings.check_nesterov(nesterov, momentum)
  return optax.chain(
    optax.trace(momentum, nesterov) if momentum else optax.identity(),
    optax.add_decayed_weights(
      weight_decay,
      mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
