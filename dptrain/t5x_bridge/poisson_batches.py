"""The dataset hook: Poisson samples addressed by the number of the update.

A sample is a function of the secret seed, the branch and the update. So there
is no position to save or restore, and several processes agree without a word.

Shapes: B physical batch over all processes, T length.
"""

from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
from typing import Any

from airio import core as airio
from clu.data import dataset_iterator
import numpy as np
from t5x import utils

from dptrain.data import batches
from dptrain.t5x_bridge import launch as launch_lib

Batch = dict[str, np.ndarray]


class PoissonBatches(airio.AirIODatasetIterator):
  """The physical batches of any update, as rows of this process.

  t5x hands an `AirIODatasetIterator` to the trainer as it is; `PrivateTrainer`
  asks it for updates by number and never for a next element.

  Formal guarantee: the sample of update t is `draws.draw` under the plan and
  the branch's keys. Nothing is dropped: the last physical batch is filled up
  with padding rows.
  """

  def __init__(
    self, launch: launch_lib.Launch, shard_id: int = 0, num_shards: int = 1
  ):
    """Takes rows [h * B / H, (h + 1) * B / H) of each batch, h of H shards."""
    size = launch.run.physical_batch_size
    self._launch = launch
    self._size = size
    self._rows = np.arange(
      shard_id * size // num_shards, (shard_id + 1) * size // num_shards
    )
    own = len(self._rows)
    self._padding = {
      "tokens": np.zeros((own, *launch.prepared.store.record_shape), np.int32),
      "example_ids": np.zeros(own, np.int32),
      "is_padding": np.ones(own, bool),
    }

  def physical_batches(self, step: int) -> Iterator[Batch]:
    """Deals out the sample of update `step`; the number of batches varies."""
    store, indices = self._launch.prepared.store, self._launch.drawn(step)
    yield from batches.physical_batches(store, indices, self._size, self._rows)

  @property
  def element_spec(self) -> Mapping[str, Any]:
    """Shapes and dtypes of this process's rows."""
    return {
      name: dataset_iterator.ArraySpec(x.dtype, x.shape)
      for name, x in self._padding.items()
    }

  def peek(self) -> Batch:
    """A batch of padding; t5x asks for it while it starts."""
    return self._padding

  def peek_async(self) -> concurrent.futures.Future[Batch]:
    """As `peek`."""
    ready: concurrent.futures.Future[Batch] = concurrent.futures.Future()
    ready.set_result(self._padding)
    return ready

  def __next__(self) -> Batch:
    """Refuses: there is no next element, only the sample of an update."""
    raise ValueError(
      "private batches are drawn by the number of the update; bind"
      " train.trainer_cls = @trainer.PrivateTrainer (dptrain.t5x_bridge)."
    )

  def get_state(self) -> dict[str, Any]:
    """Nothing."""
    return {}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Nothing: the train state's step is the position."""

  def reset(self) -> None:
    """Nothing."""

  def save(self, filename: Any) -> None:
    """Nothing to save."""

  def restore(self, filename: Any) -> None:
    """Nothing to restore."""


def get_dataset(
  cfg: utils.DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., Any],
  num_epochs: int | None = None,
  continue_from_last_checkpoint: bool = True,
  *,
  launch: launch_lib.Launch,
) -> PoissonBatches:
  """What to bind to `train.get_dataset_fn`.

  Args:
    cfg: of it, `batch_size` and `pack` are read, and checked; task, split and
      shuffling are those of the launch.
    shard_id: which rows of a batch this process takes.
    num_shards: among how many processes rows are dealt out.
    feature_converter_cls: not used: masks are drawn inside the private step.
    num_epochs: must be None.
    continue_from_last_checkpoint: not used: there is nothing to restore.
    launch: the run.

  Returns:
    The batches.

  Raises:
    ValueError: the configuration asks for what private training must not do.
  """
  del feature_converter_cls, continue_from_last_checkpoint
  if cfg.pack:
    raise ValueError(
      "DatasetConfig.pack=True would join several records into one example and"
      " break the privacy unit: bind pack = False."
    )
  size = launch.run.physical_batch_size
  if cfg.batch_size != size:
    raise ValueError(
      f"DatasetConfig.batch_size={cfg.batch_size}, but"
      f" TrainingRun.physical_batch_size={size}; bind both to"
      " %PHYSICAL_BATCH_SIZE."
    )
  if num_epochs is not None:
    raise ValueError(
      f"num_epochs={num_epochs}: a Poisson sample knows no epochs."
    )
  if size % num_shards:
    raise ValueError(
      f"physical_batch_size={size} is not a multiple of the {num_shards}"
      " processes that share a batch; choose a multiple."
    )
  return PoissonBatches(launch, shard_id, num_shards)
