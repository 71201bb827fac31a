"""The validation split under t5x: the thin loop's masks and numbers.

Shapes: n records, B batch, T length, M masked.
"""

from collections.abc import Callable, Iterator, Mapping
import pathlib
from typing import Any

from clu.data import dataset_iterator
import numpy as np
import seqio
import tensorflow as tf

from dptrain.data import corpus
from dptrain.data import store as store_lib
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.t5x_bridge import launch as launch_lib
from dptrain.training import evaluation
from dptrain.training import objective as objective_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib

NAME = "dptrain_validation"
Masked = dict[str, np.ndarray]


def of_launch(launch: launch_lib.Launch) -> Masked:
  """The masked validation records of a launch: arrays [n, ...].

  Raises:
    ValueError: the run has no validation split.
  """
  if launch.prepared.evaluator is None:
    raise ValueError(
      "the run has no validation split: bind train.train_eval_dataset_cfg ="
      " None, or a TrainingRun.validation_split."
    )
  return joined(launch.prepared.evaluator)


def of_model_dir(run: run_lib.TrainingRun) -> Masked:
  """The same, for evaluation alone: reads MODEL_DIR's vocabulary.

  Args:
    run: the run's settings; MODEL_DIR is neither locked nor written.

  Raises:
    ValueError: there is no validation split.
    FileNotFoundError: there is no vocabulary.
  """
  if run.validation_split is None:
    raise ValueError(
      "TrainingRun.validation_split is None: nothing to evaluate"
    )
  kept = pathlib.Path(run.model_dir).expanduser() / records_lib.VOCABULARY_FILE
  if not kept.exists():
    raise FileNotFoundError(
      f"{kept} is missing: MODEL_DIR must be that of the training launch."
    )
  vocabulary = vocabulary_lib.load_vocabulary(kept)
  run.model.check(run.sequence_length, vocabulary.size)
  store = store_lib.build_store(
    corpus.read_documents(run.task, run.validation_split),
    vocabulary,
    run.sequence_length,
  )
  objective = objective_lib.Objective(run.model, run.masking)
  return joined(evaluation.Evaluator(objective, store, run.evaluation))


class MaskedBatches:
  """Batches of masked records, filled up with rows of no weight."""

  def __init__(
    self, masked: Masked, batch_size: int, shard_id: int, num_shards: int
  ):
    """Takes this process's rows of batches of `batch_size`."""
    total = len(masked["inputs"])
    padding = -total % batch_size
    self._masked = {
      name: np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)])
      for name, x in masked.items()
    }
    self._size = batch_size
    self._rows = slice(
      shard_id * batch_size // num_shards,
      (shard_id + 1) * batch_size // num_shards,
    )

  @property
  def element_spec(self) -> Mapping[str, Any]:
    """Shapes and dtypes of a batch."""
    first = next(iter(self))
    return {
      name: dataset_iterator.ArraySpec(x.dtype, x.shape)
      for name, x in first.items()
    }

  def __iter__(self) -> Iterator[Masked]:
    """All batches, from the first on."""
    for start in range(0, len(self._masked["inputs"]), self._size):
      yield {
        name: x[start : start + self._size][self._rows]
        for name, x in self._masked.items()
      }


def get_datasets(
  cfg: Any,
  shard_id: int,
  num_shards: int,
  eval_steps: int = 0,
  feature_converter_cls: Callable[..., Any] | None = None,
  *,
  masked: Masked,
) -> dict[str, MaskedBatches]:
  """What to bind to `train_eval_get_dataset_fn`, of t5x's train and eval.

  The whole split is evaluated once, whatever `eval_steps` says: a wrap-around
  would count some records twice.

  Args:
    cfg: a `DatasetConfig`; of it, `batch_size` and `pack` are read.
    shard_id: which rows this process takes.
    num_shards: among how many.
    eval_steps: not read.
    feature_converter_cls: only made, so that it can refuse to pack.
    masked: the records.

  Returns:
    One dataset, named `NAME`.
  """
  del eval_steps
  if feature_converter_cls is not None:
    feature_converter_cls(pack=cfg.pack)
  if cfg.batch_size % num_shards:
    raise ValueError(
      f"the evaluation's DatasetConfig.batch_size={cfg.batch_size} is not a"
      f" multiple of {num_shards} processes; choose a multiple."
    )
  return {NAME: MaskedBatches(masked, cfg.batch_size, shard_id, num_shards)}


def register(masked: Masked) -> str:
  """A seqio task of the masked records, for t5x's inference and evaluation.

  Args:
    masked: the records.

  Returns:
    The task's name. Its metrics are accuracy and loss per masked token, from
    the model's scores.
  """
  features = {
    "inputs": masked["inputs"],
    "positions": masked["positions"],
    "targets": masked["labels"],
    "loss_weights": masked["weights"],
  }

  def read(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices(features)

  if NAME in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(NAME)
  seqio.TaskRegistry.add(
    NAME,
    source=seqio.FunctionDataSource(
      read,
      splits=("validation",),
      num_input_examples={"validation": len(masked["inputs"])},
    ),
    preprocessors=[],
    output_features={
      name: seqio.Feature(
        seqio.PassThroughVocabulary(size=0),
        add_eos=False,
        dtype=tf.as_dtype(x.dtype),
      )
      for name, x in features.items()
    },
    metric_fns=[token_metrics],
  )
  return NAME


def token_metrics(
  targets: Any, scores: Any, aux_values: Mapping[str, Any] | None = None
) -> dict[str, float]:
  """Accuracy and loss per masked token, from `MaskedLM.score_batch`."""
  del targets
  if isinstance(scores, tuple):
    scores, aux_values = scores
  if aux_values is None:
    raise ValueError("the scores lack the counts of MaskedLM.score_batch")
  count = max(float(np.sum(aux_values["masked"])), 1.0)
  return {
    "accuracy": float(np.sum(aux_values["correct"])) / count,
    "loss": -float(np.sum(scores)) / count,
  }


def joined(evaluator: evaluation.Evaluator) -> Masked:
  """The records that an evaluator holds, without padding: arrays [n, ...]."""
  parts = evaluator.masked_batches
  whole = {
    name: np.concatenate([np.asarray(part[name]) for part in parts])
    for name in ("inputs", "positions", "labels", "weights")
  }
  counts = whole["weights"].any(axis=-1)
  return {name: x[counts] for name, x in whole.items()}
