"""A prepared corpus on disk: records read by number, through memory maps.

A folder of plain NumPy files and `manifest.json`. Records have one length, so a
shard is one array [records, T] and a record is a row: no container with an
index of its own (array_record, TFRecord) is needed to find it, and whatever
reads `.npy` reads a store, in twenty years as well.

The folder is as private as the corpus: it holds its tokens.
`dptrain.data.prepare` writes it.

Letters: N records, T sequence length, n rows asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dptrain.data.store import begun_digest
from dptrain.data.store import check_indices

MANIFEST: Final = "manifest.json"
VOCABULARY: Final = "vocabulary.model"
FORMAT: Final = 1
_READ_BYTES: Final = 2**22
_ROWS_AT_ONCE: Final = 2**16


class PreparedStore:
  """One split of a prepared corpus; what `RecordStore` is in memory.

  Opening reads the manifest alone. `check` reads everything once and names a
  damaged shard.
  """

  def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
    """Opens one split.

    Args:
      folder: what `dptrain prepare` has written.
      split: name of the split.

    Raises:
      ValueError: if there is no finished store, or no such split, or a shard is
        missing or cut short.
    """
    self._folder = Path(folder)
    self._manifest = read_manifest(folder)
    splits = self._manifest["splits"]
    if split not in splits:
      known = ", ".join(map(repr, splits))
      raise ValueError(f"{folder} holds no split {split!r}; it has {known}")
    self._split: dict[str, Any] = splits[split]
    self._shards: list[dict[str, Any]] = self._split["shards"]
    self._maps: dict[tuple[int, str], npt.NDArray[Any]] = {}
    self._ends = np.cumsum([shard["records"] for shard in self._shards])
    for path, entry in self._files():
      if not path.is_file():
        raise ValueError(_damaged(path, "is missing"))
      if path.stat().st_size != entry["bytes"]:
        raise ValueError(
          _damaged(
            path, f"has {path.stat().st_size} bytes instead of {entry['bytes']}"
          )
        )

  @property
  def num_examples(self) -> int:
    """N, the number of records."""
    return int(self._split["records"])

  @property
  def sequence_length(self) -> int:
    """T, the length of every record."""
    return int(self._manifest["sequence_length"])

  @property
  def record_shape(self) -> tuple[int, ...]:
    """Shape of what one index gathers: T."""
    return (self.sequence_length,)

  @property
  def tokens(self) -> npt.NDArray[np.int32]:
    """All records at once, int32 [N, T], in memory: for small stores."""
    return self.gather(np.arange(self.num_examples))

  @property
  def documents(self) -> npt.NDArray[np.uint64] | None:
    """Each record's document, as in `RecordStore`: uint64 [N], in memory."""
    return self._keys("documents")

  @property
  def users(self) -> npt.NDArray[np.uint64] | None:
    """Each record's user, as in `RecordStore`; None if not known of all."""
    return self._keys("users")

  def _keys(self, kind: str) -> npt.NDArray[np.uint64] | None:
    if kind not in self._shards[0]:
      return None
    every = range(len(self._shards))
    return np.concatenate([self._mapped(shard, kind) for shard in every])

  def subset(self, indices: npt.NDArray[np.integer[Any]]) -> SomeRecords:
    """Some of the records; memory for their indices alone.

    Args:
      indices: integers [n] in [0, N).
    """
    return SomeRecords(self, np.asarray(indices))

  def gather(
    self, indices: npt.NDArray[np.integer[Any]]
  ) -> npt.NDArray[np.int32]:
    """Copies records out.

    Shards are read in order and each from front to back, whatever the order of
    `indices`; sorted ones are read as they come.

    Args:
      indices: integers [n] in [0, N).

    Returns:
      int32 [n, T].

    Raises:
      ValueError: if an index lies outside [0, N).
    """
    rows = np.empty((len(indices), self.sequence_length), np.int32)
    for places, shard, local in self._located(np.asarray(indices)):
      rows[places] = self._mapped(shard, "tokens")[local]
    return rows

  def token_range(self) -> tuple[int, int]:
    """The lowest and the largest token of any record, as prepared."""
    lowest, largest = self._split["token_range"]
    return int(lowest), int(largest)

  def content_digest(self) -> bytes:
    """What `RecordStore.content_digest` of the same records is, as prepared."""
    return bytes.fromhex(self._split["content"])

  def check(self, processors: int | None = None) -> None:
    """Reads every file of the split and compares it with its digest.

    Args:
      processors: threads to use; None for one per core.

    Raises:
      ValueError: names the first damaged or missing file, and the way out.
    """
    with concurrent.futures.ThreadPoolExecutor(
      processors or os.cpu_count() or 1
    ) as pool:
      for path, entry, digest in pool.map(_digested, self._files()):
        if digest != entry["sha256"]:
          raise ValueError(
            _damaged(
              path,
              "does not hold what was prepared (its SHA-256"
              " differs from the manifest's)",
            )
          )

  def _files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
    for shard in self._shards:
      for kind in ("tokens", "documents", "users"):
        if kind in shard:
          yield self._folder / shard[kind]["file"], shard[kind]

  def _located(
    self, indices: npt.NDArray[np.integer[Any]]
  ) -> Iterator[tuple[Any, int, npt.NDArray[np.integer[Any]]]]:
    """Yields (places in `indices`, shard, rows of the shard)."""
    if not indices.size:
      return
    check_indices(indices, self.num_examples)
    order = None
    if (np.diff(indices) < 0).any():
      order = np.argsort(indices, kind="stable")
      indices = indices[order]
    first, last = np.searchsorted(
      self._ends, [indices[0], indices[-1]], side="right"
    )
    begin = 0
    for shard in range(int(first), int(last) + 1):
      end = begin + int(np.searchsorted(indices[begin:], self._ends[shard]))
      if end > begin:
        start = self._ends[shard] - self._shards[shard]["records"]
        places = slice(begin, end) if order is None else order[begin:end]
        yield places, shard, indices[begin:end] - start
      begin = end

  def _mapped(self, shard: int, kind: str) -> npt.NDArray[Any]:
    if (shard, kind) not in self._maps:
      self._maps[shard, kind] = self._map(shard, kind)
    return self._maps[shard, kind]

  def _map(self, shard: int, kind: str) -> npt.NDArray[Any]:
    entry = self._shards[shard]
    path = self._folder / entry[kind]["file"]
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = (entry["records"], self.sequence_length)[: mapped.ndim]
    if mapped.shape != shape:
      raise ValueError(_damaged(path, f"holds an array of {mapped.shape}"))
    # A plain view: indexing a memmap makes memmaps, slowly.
    return mapped.view(np.ndarray)


@dataclasses.dataclass(frozen=True, eq=False)
class SomeRecords:
  """A part of a store, which is not copied.

  Attributes:
    records: the store.
    indices: integers [n]: which records are here, in this order.
  """

  records: PreparedStore
  indices: npt.NDArray[np.integer[Any]]

  @property
  def num_examples(self) -> int:
    """How many there are: n."""
    return len(self.indices)

  @property
  def sequence_length(self) -> int:
    """T, the length of every record."""
    return self.records.sequence_length

  @property
  def record_shape(self) -> tuple[int, ...]:
    """Shape of what one index gathers: T."""
    return self.records.record_shape

  def gather(
    self, indices: npt.NDArray[np.integer[Any]]
  ) -> npt.NDArray[np.int32]:
    """Copies records out: see `PreparedStore.gather`."""
    indices = np.asarray(indices)
    check_indices(indices, self.num_examples)
    return self.records.gather(self.indices[indices])

  def content_digest(self) -> bytes:
    """What `RecordStore.content_digest` of the same records is."""
    digest = begun_digest(self.num_examples, self.sequence_length)
    for begin in range(0, self.num_examples, _ROWS_AT_ONCE):
      some = self.indices[begin : begin + _ROWS_AT_ONCE]
      digest.update(self.records.gather(some).data)
    for keys in (self.records.documents, self.records.users):
      digest.update(b"none" if keys is None else keys[self.indices].tobytes())
    return bytes(digest.digest())


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads what a prepared store says of itself.

  Args:
    folder: what `dptrain prepare` has written.

  Returns:
    The manifest: see docs/data.md.

  Raises:
    ValueError: if there is none, or it is damaged or of another format.
  """
  path = Path(folder) / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    digest = manifest.pop("sha256")
    if digest != manifest_digest(manifest):
      raise ValueError("its digest is wrong")
  except FileNotFoundError as error:
    raise ValueError(
      f"{folder} holds no prepared corpus (no {MANIFEST}): the same `dptrain"
      " prepare` command makes or finishes it"
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(_damaged(path, f"cannot be read ({error})")) from error
  if manifest["format"] != FORMAT:
    raise ValueError(
      f"{folder} has format {manifest['format']}, but this dptrain reads format"
      f" {FORMAT}: prepare the corpus again, in a new folder"
    )
  return dict(manifest)


def manifest_digest(manifest: dict[str, Any]) -> str:
  """SHA-256 over a manifest without its own digest."""
  text = json.dumps(manifest, sort_keys=True, ensure_ascii=True)
  return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
  """SHA-256 of a file's bytes in hexadecimal; memory does not grow with it."""
  digest = hashlib.sha256()
  with path.open("rb", buffering=0) as file:
    while block := file.read(_READ_BYTES):
      digest.update(block)
  return digest.hexdigest()


def _digested(
  named: tuple[Path, dict[str, Any]],
) -> tuple[Path, dict[str, Any], str]:
  path, entry = named
  try:
    return path, entry, file_digest(path)
  except OSError as error:
    raise ValueError(_damaged(path, f"cannot be read ({error})")) from error


def _damaged(path: Path, how: str) -> str:
  return (
    f"the prepared corpus is damaged: {path} {how}. Restore that file from a"
    f" backup, or delete {path.parent} and prepare the corpus again"
  )
