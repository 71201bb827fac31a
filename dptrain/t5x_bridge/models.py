"""The masked language model as t5x knows models.

Shapes: B batch, T length, M masked, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

from clu import metrics as clu_metrics
from flax import core
from flax import traverse_util
import flax.linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from t5x import models

from dptrain.models import masked_lm
from dptrain.t5x_bridge import features

Batch = Mapping[str, jax.Array]


class MaskedLM(models.BaseModel):
  """A `MaskedLanguageModel` for t5x's evaluation, inference and checkpoints.

  Training does not come through here: `PrivateTrainer` gives the model's
  per-example losses to the private step. Batches are masked records: "inputs"
  [B, T], "positions", "labels" and "weights" [B, M].

  Attributes:
    model: encoder and objective.
  """

  FEATURE_CONVERTER_CLS = features.MaskedFeatures

  def __init__(
    self, model: masked_lm.MaskedLanguageModel, optimizer_def: Any = None
  ):
    """Takes the model; evaluation needs no optimizer."""
    super().__init__(optimizer_def)
    self.model = model

  def get_initial_variables(
    self, rng: jax.Array, input_shapes: Any, input_types: Any = None
  ) -> core.FrozenDict[str, Any]:
    """Fresh parameters, and the names of their axes."""
    del input_shapes, input_types
    params = self.model.init(rng)
    return core.freeze({"params": params, "params_axes": self._axes(params)})

  def loss_fn(
    self, params: Any, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, dict[str, clu_metrics.Metric]]:
    """Mean of per-example losses; accuracy and loss per masked token.

    Args:
      params: of the model.
      batch: masked records.
      dropout_rng: must be None.

    Raises:
      ValueError: asked to train, which only the private step may.
    """
    if dropout_rng is not None:
      raise ValueError(
        "MaskedLM.loss_fn is for evaluation: under this trainer gradients would"
        " be neither clipped nor noised. Bind train.trainer_cls ="
        " @trainer.PrivateTrainer (dptrain.t5x_bridge)."
      )
    losses, aux = self._losses(params, batch)
    masked = aux["masked"].sum()

    def per_token(total: jax.Array) -> clu_metrics.Metric:
      return clu_metrics.Average(total=total.sum(), count=masked)

    return losses.mean(), {
      "accuracy": per_token(aux["correct"]),
      "loss": per_token(aux["loss_sum"]),
    }

  def score_batch(
    self, params: Any, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """Log-likelihood of each example's masked tokens.

    Args:
      params: of the model.
      batch: masked records.
      return_intermediates: not read.

    Returns:
      float32 [B], and [B] arrays "correct" and "masked" (counts of tokens).
    """
    del return_intermediates
    _, aux = self._losses(params, batch)
    counts = {name: aux[name] for name in ("correct", "masked")}
    return -aux["loss_sum"], counts

  def predict_batch_with_aux(
    self, params: Any, batch: Batch, rng: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The likeliest token at each masked position.

    Args:
      params: of the model.
      batch: of it, "inputs" and "positions" are read.
      rng: not read.

    Returns:
      int32 [B, M] tokens, and their log-probabilities "scores" [B, M].
    """
    del rng
    with _unconstrained():
      logits: Any = self.model.bert.apply(
        {"params": core.unfreeze(params)}, batch["inputs"], batch["positions"]
      )
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.argmax(logits, axis=-1), {"scores": log_probs.max(axis=-1)}

  def _losses(self, params: Any, batch: Batch) -> Any:
    with _unconstrained():
      return self.model.losses(core.unfreeze(params), batch)

  def _axes(self, params: Any) -> dict[str, Any]:
    """Axis names in the form in which t5x looks for them."""
    names = traverse_util.flatten_dict(self.model.logical_axes())
    flat = traverse_util.flatten_dict(params)
    if unnamed := sorted(set(flat) - set(names)):
      raise ValueError(
        f"the model has a parameter {'/'.join(unnamed[0])} without axis names:"
        " create it with flax.linen.with_partitioning."
      )
    return traverse_util.unflatten_dict(
      {
        (*path[:-1], f"{path[-1]}_axes"): partitioning.AxisMetadata(
          names=names[path]
        )
        for path in flat
      }
    )


def _unconstrained() -> Any:
  """Sets t5x's axis rules aside while the model is applied.

  Plain parameters have their places already, and Flax, under rules, constrains
  what an initialiser would return before it has its shape.
  """
  return nn.logical_axis_rules(())
