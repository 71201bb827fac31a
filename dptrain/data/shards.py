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
ARRAYS: Final = ("tokens", "documents", "users")
# Texts tokenised in one call: their ids are Python numbers for a moment.
_CHARS_PER_CALL: Final = 500_000


class Chunk(NamedTuple):
  """Documents of one shard, with whatever it takes to write it."""

  folder: Path
  name: str
  documents: list[Document]
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
    digest = hashlib.sha256()
    for each in held:
      for part in (each.document or each.source, each.unit, each.text):
        data = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return Chunk(
      folder,
      f"{stem(split)}-{number:06d}",
      held,
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
  for kind in ARRAYS:
    if kind not in noted:
      continue
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
    texts = [each.text for each in chunk.documents]
    blocks = [
      records
      for some in _calls(texts)
      for records in store.cut_records(some, self._vocabulary, *self._cut, 1)
    ]
    made: dict[str, Any] = {
      "name": chunk.name,
      "source": chunk.source,
      "documents_read": len(texts),
      "text_bytes": sum(
        len(text.encode("utf-8", errors="surrogatepass")) for text in texts
      ),
      "records": sum(map(len, blocks)),
    }
    if made["records"]:
      tokens = np.concatenate(blocks)
      made["token_range"] = [int(tokens.min()), int(tokens.max())]
      counted = [
        (each, len(records))
        for each, records in zip(chunk.documents, blocks, strict=True)
        if len(records)
      ]
      arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": tokens.astype(token_dtype(self._vocabulary.size)),
        "documents": store.hashed_keys(
          [(each.document or each.source, n) for each, n in counted]
        ),
      }
      if all(each.unit for each, _ in counted):
        arrays["users"] = store.hashed_keys([(e.unit, n) for e, n in counted])
      for kind, array in arrays.items():
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
