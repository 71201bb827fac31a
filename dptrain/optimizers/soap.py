"""SOAP: Adam in the eigenbasis of Shampoo's factors (arXiv 2409.11321).

For a matrix G, Q_L^T G Q_R is what Adam sees, where Q_L and Q_R diagonalise the
averages of G G^T and G^T G. Shampoo divides by a product of row and column
scales in this basis; SOAP keeps a second moment per coordinate of it, at every
update, while the basis changes every `interval` updates.

Formal guarantee: post-processing. What is read is the gradient given, the
parameters, the state and public constants.
"""

from typing import Any

import optax

from dptrain.optimizers import settings as settings_lib
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import soap_settings
from dptrain.optimizers import soap_transform
from dptrain.optimizers import weight_decay as weight_decay_lib


def soap(
  learning_rate: optax.ScalarOrSchedule,
  settings: soap_settings.SoapSettings | None = None,
  weight_decay: float = 0.5,
  decay_norms_and_biases: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Builds SOAP; each update also multiplies weights by 1 - lr * decay.

  Steps are as long as Adam's: learning rates and decays that suit
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
    soap_transform.scale_by_soap(settings),
    optax.add_decayed_weights(
      weight_decay,
      mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def describe(
  params: Any, settings: soap_settings.SoapSettings | None = None
) -> list[str]:
  """Says which parameters SOAP would turn to an eigenbasis, and which not.

  Args:
    params: a pytree of arrays, or of their shapes.
    settings: of SOAP; None for the defaults.

  Returns:
    Lines of text, as `shampoo_blocks.describe`.
  """
  settings = settings or soap_settings.SoapSettings()
  plans = shampoo_blocks.plan(params, settings.blocking, with_roots=False)
  return shampoo_blocks.describe_plans(plans)
