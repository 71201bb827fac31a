"""One shard of a prepared corpus: which documents it holds, and its writing.

Files appear by renaming, whole; a shard counts as made once its entry stands in
`unfinished/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import hashlib
import io
import json
import os
from pathlib import Path
import re
import tempfile
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.data import store
from dptrain.data.corpus import Document
from dptrain.data.vocabulary import Vocabulary

UNFINISHED: Final = "unfinished"
ARRAYS: Final = ("tokens", "units")
# Texts tokenised in one call: their ids are Python numbers for a moment.
_CHARS_PER_CALL: Final = 500_000


class Chunk(NamedTuple):
  """Documents of one shard, with whatever it takes to write it."""

  folder: Path
  name: str
  texts: list[str]
  units: list[str]
  source: str


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
  """The smaller of the two dtypes that stores know, if tokens fit."""
  return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.int32)


def stem(split: str) -> str:
  """What the names of a split's files begin with."""
  return re.sub(r"[^A-Za-z0-9]+", "_", split)


def chunks(
  folder: Path, split: str, documents: Iterable[Document], shard_chars: int
) -> Iterator[Chunk]:
  """Groups documents by their order and length alone.

  Args:
    folder: of the store.
    split: name of the split.
    documents: the split's.
    shard_chars: a chunk ends with the document that reaches so many characters.

  Returns:
    An iterator over chunks.
  """
  number = 0

  def chunk(held: list[Document]) -> Chunk:
    units = [
      f"s{each.source}" if each.unit is None else f"u{each.unit}"
      for each in held
    ]
    digest = hashlib.sha256()
    for unit, each in zip(units, held, strict=True):
      for part in (unit, each.text):
        data = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return Chunk(
      folder,
      f"{stem(split)}-{number:06d}",
      [each.text for each in held],
      units,
      digest.hexdigest(),
    )

  held: list[Document] = []
  chars = 0
  for document in documents:
    held.append(document)
    chars += len(document.text)
    if chars >= shard_chars:
      yield chunk(held)
      held, chars, number = [], 0, number + 1
  if held:
    yield chunk(held)


def entry(chunk: Chunk) -> dict[str, Any] | None:
  """What is noted of a chunk's shard; None if it is to be made.

  Raises:
    ValueError: if a shard was made, but of other documents.
  """
  try:
    path = chunk.folder / UNFINISHED / f"{chunk.name}.json"
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  if noted["source"] != chunk.source:
    raise ValueError(
      f"the documents of {chunk.name} are not those that {chunk.folder} was"
      " begun with: the corpus has changed, or comes in another order. Delete"
      " that folder and begin again"
    )
  for kind in ARRAYS if noted["records"] else ():
    path = chunk.folder / noted[kind]["file"]
    if not path.is_file() or path.stat().st_size != noted[kind]["bytes"]:
      return None
  return noted


class ShardMaker:
  """Makes shards, in a process of its own or in this one."""

  def __init__(self, model: bytes, sequence_length: int, min_tokens: int):
    self._vocabulary = Vocabulary(model)
    self._cut = sequence_length, min_tokens

  def make(self, chunk: Chunk) -> dict[str, Any]:
    """Writes a chunk's shard, and then its entry, which is returned."""
    blocks = [
      records
      for texts in _calls(chunk.texts)
      for records in store.cut_records(texts, self._vocabulary, *self._cut, 1)
    ]
    counts = [len(records) for records in blocks]
    tokens = np.concatenate(blocks)
    made: dict[str, Any] = {
      "name": chunk.name,
      "source": chunk.source,
      "documents": len(chunk.texts),
      "text_bytes": sum(
        len(text.encode("utf-8", errors="surrogatepass"))
        for text in chunk.texts
      ),
      "records": len(tokens),
    }
    if len(tokens):
      made["token_range"] = [int(tokens.min()), int(tokens.max())]
      tokens = tokens.astype(token_dtype(self._vocabulary.size))
      units = np.array([_unit_number(unit) for unit in chunk.units], np.uint64)
      arrays: tuple[npt.NDArray[Any], ...] = tokens, np.repeat(units, counts)
      for kind, array in zip(ARRAYS, arrays, strict=True):
        path = chunk.folder / f"{chunk.name}.{kind}.npy"
        made[kind] = _write_array(path, array)
    note = chunk.folder / UNFINISHED / f"{chunk.name}.json"
    write(note, json.dumps(made).encode())
    return made


def _calls(texts: list[str]) -> Iterator[list[str]]:
  held: list[str] = []
  chars = 0
  for text in texts:
    held.append(text)
    chars += len(text)
    if chars >= _CHARS_PER_CALL:
      yield held
      held, chars = [], 0
  if held:
    yield held


def _unit_number(key: str) -> int:
  data = key.encode("utf-8", errors="surrogatepass")
  return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def write(path: Path, data: bytes | memoryview) -> None:
  """Writes a file that appears whole, and stays after a power cut.

  Args:
    path: in a store's folder or in its `unfinished/`, which exists.
    data: its bytes.
  """
  folder = path.parent
  if folder.name != UNFINISHED:
    folder = folder / UNFINISHED
  handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
  with os.fdopen(handle, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  umask = os.umask(0)
  os.umask(umask)
  os.chmod(partial, 0o666 & ~umask)
  os.replace(partial, path)
  parent = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(parent)
  finally:
    os.close(parent)


def _write_array(path: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
  """Writes a `.npy` file; its name, size and digest."""
  data = io.BytesIO()
  np.save(data, array, allow_pickle=False)
  written = data.getbuffer()
  write(path, written)
  return {
    "file": path.name,
    "bytes": len(written),
    "sha256": hashlib.sha256(written).hexdigest(),
  }
