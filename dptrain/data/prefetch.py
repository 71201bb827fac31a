"""Makes what comes next while the caller is busy with what came before."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
import threading
import time
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Prefetcher(Generic[_T]):
  """An iterator over `items`, in their order, made ahead by a thread.

  What `items` raises, `next` raises at its place. `close` ends the thread.

  Attributes:
    waited: seconds that `next` has waited for items so far.
  """

  def __init__(self, items: Iterable[_T], depth: int) -> None:
    """Starts the thread.

    Args:
      items: iterated over in the thread alone.
      depth: the most items that wait to be taken, at least 1.

    Raises:
      ValueError: for a depth below 1.
    """
    if depth < 1:
      raise ValueError(f"depth={depth} must be at least 1")
    self.waited = 0.0
    self._items, self._depth = items, depth
    self._ready: collections.deque[_T] = collections.deque()
    self._changed = threading.Condition()
    self._end: BaseException | None = None
    self._closed = False
    self._thread = threading.Thread(target=self._make, daemon=True)
    self._thread.start()

  def __iter__(self) -> Iterator[_T]:
    """Itself."""
    return self

  def __next__(self) -> _T:
    """The next item.

    Raises:
      StopIteration: after the last, or once closed.
    """
    begin = time.monotonic()
    with self._changed:
      self._changed.wait_for(lambda: self._ready or self._end or self._closed)
      self.waited += time.monotonic() - begin
      if self._ready and not self._closed:
        item = self._ready.popleft()
        self._changed.notify_all()
        return item
      raise self._end or StopIteration

  def close(self) -> None:
    """Drops what is ready and waits for the thread to end."""
    with self._changed:
      self._closed = True
      self._ready.clear()
      self._changed.notify_all()
    self._thread.join()

  def _make(self) -> None:
    end: BaseException = StopIteration()
    try:
      for item in self._items:
        with self._changed:
          self._changed.wait_for(
            lambda: len(self._ready) < self._depth or self._closed
          )
          if self._closed:
            return
          self._ready.append(item)
          self._changed.notify_all()
    except BaseException as error:
      end = error
    with self._changed:
      self._end = end
      self._changed.notify_all()
