"""Physical batches of update after update, built while the devices compute."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data import batches
from dptrain.data import prefetch
from dptrain.data import store as store_lib

# Batches that wait: enough to draw the next update's sample meanwhile.
_DEPTH = 16


class Feed:
  """The samples of a run as batches in memory, update by update.

  A thread draws, reads and deals out ahead, across the border between updates:
  what comes, and in which order, it does not decide.
  """

  def __init__(
    self,
    draw: Callable[[int], npt.NDArray[np.int64]],
    store: store_lib.Examples,
    physical_batch_size: int,
    rows: npt.NDArray[np.integer[Any]] | None,
    steps: range,
  ):
    """Begins to draw.

    Args:
      draw: the records of an update; called in another thread, in order.
      store: what is sampled. PRIVATE.
      physical_batch_size: P.
      rows: of each batch that this process builds; None for all.
      steps: the updates.
    """

    def made() -> Iterator[Any]:
      for step in steps:
        indices = draw(step)
        yield step
        yield from batches.physical_batches(
          store, indices, physical_batch_size, rows
        )
        yield None

    self._made = prefetch.Prefetcher(made(), _DEPTH)

  def update(self, step: int) -> Iterator[Any]:
    """The batches of update `step`: the next one, to be taken to its end.

    Raises:
      RuntimeError: it is not the next one.
    """
    found = next(self._made, None)
    if found != step:
      raise RuntimeError(f"the feed is at {found}, not at update {step}")
    while (batch := next(self._made)) is not None:
      yield batch

  @property
  def waited(self) -> float:
    """Seconds that the loop has waited for batches."""
    return self._made.waited

  def close(self) -> None:
    """Ends the thread."""
    self._made.close()
