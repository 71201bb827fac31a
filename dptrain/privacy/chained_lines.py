"""An append-only file of JSON lines, each with the hash of the one before."""

from collections.abc import Callable, Mapping
import contextlib
import errno
import hashlib
import json
import os
import pathlib
from typing import Any

_NO_HASH = "0" * 64


class LedgerError(ValueError):
  """The ledger is damaged, or does not belong to what is asked of it."""


class ChainedLines:
  """The lines of one file, read at once and added to one by one.

  Attributes:
    path: the file.
    head: hash of the last line: names all that is written so far.
  """

  def __init__(
    self, path: pathlib.Path, take: Callable[[Mapping[str, Any]], None]
  ):
    """Reads the file, if it is there.

    Args:
      path: the file.
      take: called with each line, in order; a ValueError, KeyError or TypeError
        says that the line is wrong.

    Raises:
      LedgerError: a line is damaged; names it.
    """
    self.path = path
    self.head = _NO_HASH
    self._take = take
    self._file: Any = None
    self._good_bytes = 0
    if path.exists():
      self._load()

  def attach(self, file: Any) -> None:
    """Writes into this open file from now on, after its last whole line."""
    os.ftruncate(file.fileno(), self._good_bytes)
    self._file = file

  def append(self, entry: Mapping[str, Any]) -> None:
    """Adds a line, which is on disk (fsync) when this returns.

    Raises:
      LedgerError: nothing is attached.
      OSError: the line could not be written; the file is as before.
    """
    if self._file is None:
      raise LedgerError(f"{self.path} is open for reading only.")
    entry = {**entry, "previous": self.head}
    line = (json.dumps(entry, sort_keys=True) + "\n").encode()
    try:
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      os.fsync(self._file.fileno())
    except OSError as error:
      with contextlib.suppress(OSError):
        os.ftruncate(self._file.fileno(), self._good_bytes)
      raise OSError(
        error.errno,
        f"cannot write the privacy ledger ({error.strerror}): training stops"
        " before the update that it could not record. Free space and start"
        " again; nothing is lost",
        str(self.path),
      ) from error
    self._taken(entry, line)

  def _load(self) -> None:
    data = self.path.read_bytes()
    # A kill in mid-write leaves a last line without its end: the update that it
    # announced was never made.
    *lines, _ = data.split(b"\n")
    for number, line in enumerate(lines, 1):
      try:
        entry = json.loads(line)
        if entry["previous"] != self.head:
          raise ValueError(
            "the hash in it is not that of the line before; one of the two was"
            " changed"
          )
        self._taken(entry, line + b"\n")
      except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
          f"{self.path}, line {number} is damaged: {error}. Restore the ledger"
          " from a backup; without it nothing can be claimed for this run."
        ) from error

  def _taken(self, entry: Mapping[str, Any], line: bytes) -> None:
    self._take(entry)
    self.head = hashlib.sha256(line).hexdigest()
    self._good_bytes += len(line)
