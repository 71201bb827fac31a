"""Accuracy on the validation split, beside that of a constant guess.

Shapes: B batch, M masked, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from dptrain.data import batches
from dptrain.data import masking
from dptrain.data import store as store_lib
from dptrain.training import mesh as mesh_lib
from dptrain.training import objective as objective_lib
from dptrain.training import settings as settings_lib


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """When to evaluate, and on how much.

  Attributes:
    period: updates between evaluations; 0 evaluates at the end only.
    max_records: the most validation records to use; None for all.
    physical_batch_size: records evaluated at once.
  """

  period: int = 0
  max_records: int | None = None
  physical_batch_size: int = 64

  def __post_init__(self) -> None:
    for name, least in (("period", 0), ("physical_batch_size", 1)):
      value = getattr(self, name)
      settings_lib.check_whole(f"EvaluationSettings.{name}", value, least)
    if self.max_records is not None:
      name = "EvaluationSettings.max_records"
      settings_lib.check_whole(name, self.max_records, least=1)


class Evaluation(NamedTuple):
  """Result on the validation split. Outside the privacy guarantee.

  Attributes:
    accuracy: share of masked tokens that the model's first guess gets right.
    loss: mean cross-entropy per masked token, in nats.
    baseline_accuracy: share that the most frequent of these tokens would get.
    num_tokens: masked tokens counted.
  """

  accuracy: float
  loss: float
  baseline_accuracy: float
  num_tokens: int


class Evaluator:
  """Holds the validation split under masks that never change."""

  def __init__(
    self,
    objective: objective_lib.Objective,
    store: store_lib.Store,
    settings: EvaluationSettings,
    layout: mesh_lib.Layout | None = None,
  ):
    size = min(settings.physical_batch_size, store.num_examples)
    shards = layout.num_shards if layout else 1
    self._layout, self._size = layout, -(-size // shards) * shards
    # Public and fixed: evaluations of one run, and of different runs, compare.
    key = jax.random.key(20181011, impl="threefry2x32")

    @jax.jit
    def mask(batch: Any) -> Any:
      keys = masking.example_keys(key, batch["example_ids"])
      masked = objective.mask(batch, keys)
      weights = masked["weights"] * ~batch["is_padding"][:, None]
      return masked | {"weights": weights}

    dealt = batches.evaluation_batches(store, self._size, settings.max_records)
    self._batches = [jax.device_get(mask(batch)) for batch in dealt]
    counts = np.zeros(objective.model.bert.vocab_size)
    for masked in self._batches:
      np.add.at(counts, masked["labels"], masked["weights"])
    self._num_tokens = int(counts.sum())
    self._baseline = float(counts.max() / max(self._num_tokens, 1))

    @jax.jit
    def summed(params: Any, masked: Any) -> dict[str, jax.Array]:
      _, aux = objective.model.losses(params, masked)
      return {name: aux[name].sum() for name in ("correct", "loss_sum")}

    self._summed = summed

  @property
  def masked_batches(self) -> list[Any]:
    """The held split: inputs of the model, padding rows without weight."""
    return self._batches

  def evaluate(self, params: Any) -> Evaluation:
    """Evaluates `params`, whole along fsdp, on the whole of the held split."""
    sums = {"correct": 0.0, "loss_sum": 0.0}
    for masked in self._batches:
      found = self._summed(params, self._placed(masked))
      for name in sums:
        sums[name] += float(found[name])
    count = max(self._num_tokens, 1)
    return Evaluation(
      accuracy=sums["correct"] / count,
      loss=sums["loss_sum"] / count,
      baseline_accuracy=self._baseline,
      num_tokens=self._num_tokens,
    )

  def _placed(self, masked: Any) -> Any:
    if self._layout is None:
      return masked
    rows = self._layout.own_rows(self._size)
    own = jax.tree.map(lambda x: x[rows], masked)
    return self._layout.place(own, self._size)
