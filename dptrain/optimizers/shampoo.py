"""Distributed Shampoo (arXiv 2002.09018, 1802.09568) with grafted step sizes.

An update of a matrix is L^(-1/4) G R^(-1/4), where L and R gather G G^T and
G^T G: steepest descent in a geometry that knows which rows, and which columns,
move together. Its length per layer comes from another optimizer (grafting,
arXiv 2002.11803), which also stands in until there are roots.

Formal guarantee: post-processing. What is read is the gradient given, the
parameters, the state and public constants.
"""

from typing import Any

import optax

from dptrain.optimizers import settings as settings_lib
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform
from dptrain.optimizers import weight_decay as weight_decay_lib


def shampoo(
  learning_rate: optax.ScalarOrSchedule,
  settings: shampoo_settings.ShampooSettings | None = None,
  weight_decay: float = 0.5,
  decay_norms_and_biases: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Builds Shampoo; each update also multiplies weights by 1 - lr * decay.

  With the default graft, learning rates and decays that suit
  `dptrain.optimizers.adamw` are the place to start.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    settings: everything else; None for the defaults.
    weight_decay: decay per unit of learning rate, 0 or more.
    decay_norms_and_biases: decay every parameter, not only matrices.

  Returns:
    An Optax transformation. Its `update` needs `params` and takes
    `noise_variance`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings_lib.check_learning_rate(learning_rate)
  settings_lib.check_weight_decay(weight_decay, learning_rate)
  return optax.chain(
    shampoo_transform.scale_by_shampoo(settings),
    optax.add_decayed_weights(
      weight_decay,
      mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def describe(
  params: Any, settings: shampoo_settings.ShampooSettings | None = None
) -> list[str]:
  """Says what Shampoo would precondition, and what not and why.

  Args:
    params: a pytree of arrays, or of their shapes.
    settings: of Shampoo; None for the defaults.

  Returns:
    Lines of text.
  """
  return shampoo_blocks.describe(
    params, (settings or shampoo_settings.ShampooSettings()).blocking
  )
