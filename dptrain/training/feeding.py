"""Physical batches of update after update, built while the devices compute."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dptrain.data import batches
from dptrain.data import prefetch
from dptrain.data import store as store_lib
from dptrain.privacy import draws

# Batches that wait: enough to draw the next update's sample meanwhile.
_DEPTH = 16


class Shards(NamedTuple):
  """The shards of a mesh that this process has rows for.

  Attributes:
    own: their numbers, in the order of a physical batch's rows.
    num_shards: S, of all.
  """

  own: tuple[int, ...] = (0,)
  num_shards: int = 1


class Feed:
  """The samples of a run as batches in memory, update by update.

  A thread draws, reads and deals out ahead, across the border between updates:
  what comes, and in which order, it does not decide.
  """

  def __init__(
    self,
    draw: Callable[[int], draws.Drawn],
    store: store_lib.Examples,
    physical_batch_size: int,
    shards: Shards,
    steps: range,
  ):
    """Begins to draw.

    Args:
      draw: the sample of an update; called in another thread, in order.
      store: what is sampled. PRIVATE.
      physical_batch_size: P.
      shards: which shares of a sample this process deals out. A record's
        shard depends on how many there are and not on how many processes.
      steps: the updates.
    """

    def made() -> Iterator[Any]:
      for step in steps:
        sample = draw(step)
        yield step
        size, count = sample.size, shards.num_shards
        yield from batches.batches_of_shares(
          store,
          [
            sample.part(size * own // count, size * (own + 1) // count)
            for own in shards.own
          ],
          physical_batch_size // count,
          -(-size // physical_batch_size),
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
