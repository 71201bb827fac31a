"""What a model with an N-Grammer asks of its step and optimizer.

Whoever builds a private step asks here, so that no loop forgets it; for models
without an N-Grammer nothing changes.
"""

from typing import Any

import optax

from dptrain.models import masked_lm
from dptrain.models import scaled
from dptrain.optimizers import codebook_learning
from dptrain.optimizers import codebook_settings
from dptrain.reports import wording
from dptrain.training import unprotected_codebooks as codebooks_lib


def optimizer_for(
  model: masked_lm.MaskedLanguageModel,
  optimizer: optax.GradientTransformation,
  settings: codebook_settings.CodebookSettings | None = None,
) -> optax.GradientTransformation:
  """The optimizer of a run: the user's, and around it what codebooks need.

  Args:
    model: of the run; its `bert.ngrammer` says how codebooks learn.
    optimizer: the user's, or one that this function or `complete` returned.
    settings: rates, decays and thresholds; None: the defaults.

  Returns:
    An Optax transformation; `optimizer` itself for a model without N-Grammer,
    or if it sees to codebooks already.

  Raises:
    ValueError: the gradients of the model's codebooks are scaled.
  """
  check_scaled(model)
  ngrammer = _ngrammer(model)
  done = isinstance(optimizer, codebook_learning.CodebookOptimizer)
  if ngrammer is None or done:
    return optimizer
  return codebook_learning.learn_codebooks(
    optimizer,
    settings,
    learning=ngrammer.learning,
    deviation_scale=ngrammer.deviation_scale,
    select_rows=ngrammer.select_rows,
  )


def complete(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An optimizer that `optimizer_for` shall leave as it is.

  Args:
    optimizer: one with `optimizer_for` applied somewhere within.
  """
  return codebook_learning.CodebookOptimizer(
    *optax.with_extra_args_support(optimizer)
  )


def unprotected_codebooks(
  model: masked_lm.MaskedLanguageModel,
) -> codebooks_lib.UnprotectedCodebooks | None:
  """`PrivateStep.unprotected_codebooks` for a model; None if it has none."""
  if not _is_unprotected(model):
    return None
  return codebooks_lib.UnprotectedCodebooks()


def check_scaled(model: masked_lm.MaskedLanguageModel) -> None:
  """Refuses codebooks whose gradients are divided by something.

  Raises:
    ValueError: a `ScaledModel` has an N-Grammer.
  """
  if _ngrammer(model) is not None and isinstance(model, scaled.ScaledModel):
    raise ValueError(
      "ScaledModel divides the gradients that its N-Grammer's codebooks learn"
      " from: use Bert.ngrammer=None, or the model without ScaledModel."
    )


def check_claim(
  model: masked_lm.MaskedLanguageModel, fixed_seed: int | None
) -> None:
  """Refuses codebooks that leak in a run that claims privacy.

  Args:
    model: of the run.
    fixed_seed: of the run; None: its seed is secret, and it makes a claim.

  Raises:
    ValueError: it would publish exact means.
  """
  if fixed_seed is None and _is_unprotected(model):
    raise ValueError(
      "NGrammerSettings.learning='unprotected' publishes exact means of the"
      " private batch: set it to 'private' (or 'gradient', or 'frozen'), or"
      " give up every privacy claim by TrainingRun.fixed_seed=0."
    )


def unprotected(model: masked_lm.MaskedLanguageModel) -> str | None:
  """What a report says of codebooks that are not protected; None: nothing."""
  if not _is_unprotected(model):
    return None
  return wording.EXACT_CODEBOOKS


def _is_unprotected(model: masked_lm.MaskedLanguageModel) -> bool:
  ngrammer = _ngrammer(model)
  return ngrammer is not None and ngrammer.learning == "unprotected"


def _ngrammer(model: masked_lm.MaskedLanguageModel) -> Any:
  return getattr(model.bert, "ngrammer", None)
