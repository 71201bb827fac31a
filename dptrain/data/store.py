"""Token records in memory: each is one fixed-length sequence.

A record is the unit of privacy: adding or removing one changes one row. A long
document gives several records, so the guarantee is per record, not per
document. Records never mix documents.

Letters: N records, T sequence length, n rows asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dptrain.data.corpus import Document
from dptrain.data.special_tokens import CLS_ID
from dptrain.data.special_tokens import PAD_ID
from dptrain.data.special_tokens import SEP_ID
from dptrain.data.vocabulary import Vocabulary

_SHORTEST_SEQUENCE: Final = 8
# Enough characters per call to occupy every core, few enough to hold.
_CHARS_PER_CALL: Final = 4_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class RecordStore:
  """A corpus as one read-only array of tokens.

  Attributes:
    tokens: int32 [N, T]; rows read [CLS] ... [SEP] [PAD] ...
    documents: uint64 [N], equal for the records of one document (64 bits of a
      hash of its key); None: every record is one of its own.
    users: uint64 [N], likewise for the records of one user; None if the corpus
      does not tell.

  Raises:
    ValueError: if `tokens` has another dtype or rank, or no rows.
  """

  tokens: npt.NDArray[np.int32]
  documents: npt.NDArray[np.uint64] | None = None
  users: npt.NDArray[np.uint64] | None = None

  def __post_init__(self) -> None:
    if self.tokens.dtype != np.int32 or self.tokens.ndim != 2:
      raise ValueError(
        f"tokens is {self.tokens.dtype} of shape {self.tokens.shape}; a record "
        "store needs int32 of shape [num_examples, sequence_length]"
      )
    if not self.tokens.size:
      raise ValueError(f"tokens of shape {self.tokens.shape} holds no record")
    for name in ("documents", "users"):
      keys = getattr(self, name)
      if keys is not None and keys.shape != self.tokens.shape[:1]:
        raise ValueError(
          f"{name} has shape {keys.shape}; it needs one key for each of the"
          f" {len(self.tokens)} records"
        )
    tokens = np.ascontiguousarray(self.tokens).view()
    tokens.flags.writeable = False
    object.__setattr__(self, "tokens", tokens)

  @property
  def num_examples(self) -> int:
    """N, the number of records."""
    return int(self.tokens.shape[0])

  @property
  def sequence_length(self) -> int:
    """T, the length of every record."""
    return int(self.tokens.shape[1])

  @property
  def record_shape(self) -> tuple[int, ...]:
    """Shape of what one index gathers: T."""
    return (self.sequence_length,)

  def subset(self, indices: npt.NDArray[np.integer[Any]]) -> RecordStore:
    """The store of some of the records.

    Args:
      indices: integers [n] in [0, N).
    """
    some = [
      None if keys is None else keys[indices]
      for keys in (self.documents, self.users)
    ]
    return RecordStore(self.gather(indices), *some)

  def gather(
    self, indices: npt.NDArray[np.integer[Any]]
  ) -> npt.NDArray[np.int32]:
    """Copies records out.

    Args:
      indices: integers [n] in [0, N).

    Returns:
      int32 [n, T].

    Raises:
      ValueError: if an index lies outside [0, N).
    """
    indices = np.asarray(indices)
    # NumPy would read a negative index from the end without a word.
    if indices.size and not (
      indices.min() >= 0 and indices.max() < self.num_examples
    ):
      raise ValueError(
        f"record indices reach from {indices.min()} to {indices.max()}; the "
        f"store holds records 0 to {self.num_examples - 1}"
      )
    return self.tokens[indices]

  def content_digest(self) -> bytes:
    """SHA-256 over shape, dtype and bytes: equal for equal stores alone."""
    head = f"{self.tokens.shape} {self.tokens.dtype.str}".encode()
    digest = hashlib.sha256(head)
    digest.update(self.tokens.data)
    for keys in (self.documents, self.users):
      digest.update(b"none" if keys is None else keys.tobytes())
    return digest.digest()


def build_store(
  documents: Iterable[Document],
  vocabulary: Vocabulary,
  sequence_length: int,
  *,
  min_tokens: int = 8,
) -> RecordStore:
  """Tokenises documents and cuts them into records.

  Each document is cut into pieces of T - 2 tokens; each piece becomes one
  record `[CLS] piece [SEP]`, padded with [PAD] to length T. Documents without
  any token give no record.

  Args:
    documents: the documents; the order of the records follows theirs.
    vocabulary: the vocabulary.
    sequence_length: T, at least 8.
    min_tokens: drop a document's last piece if it is shorter than this, unless
      the document has no other.

  Returns:
    The store.

  Raises:
    ValueError: if the documents give no record, or a setting is out of range.
  """
  if sequence_length < _SHORTEST_SEQUENCE:
    raise ValueError(
      f"sequence_length={sequence_length} must be at least "
      f"{_SHORTEST_SEQUENCE}, to leave room between [CLS] and [SEP]"
    )
  if min_tokens < 1:
    raise ValueError(
      f"min_tokens={min_tokens} must be at least 1; 1 keeps every piece"
    )
  blocks: list[npt.NDArray[np.int32]] = []
  keys: list[tuple[Document, int]] = []
  for some in _chunks(documents):
    encoded = vocabulary.encode([document.text for document in some])
    for document, ids in zip(some, encoded, strict=True):
      if ids:
        blocks.append(
          _records(np.asarray(ids, np.int32), sequence_length, min_tokens)
        )
        keys.append((document._replace(text=""), len(blocks[-1])))
  if not blocks:
    raise ValueError(
      "the corpus is empty: no document in it holds a token; check the task's "
      "files and the split's name"
    )
  return RecordStore(
    np.concatenate(blocks),
    _keys([(each.document or each.source, n) for each, n in keys]),
    _keys([(each.unit, n) for each, n in keys])
    if all(each.unit for each, _ in keys)
    else None,
  )


def _keys(counted: list[tuple[str, int]]) -> npt.NDArray[np.uint64]:
  """64 bits of each key's hash, as often as it has records."""
  hashes = [
    hashlib.sha256(key.encode("utf-8", errors="replace")).digest()[:8]
    for key, _ in counted
  ]
  return np.repeat(
    np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64),
    [count for _, count in counted],
  )


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Groups documents for encoding, whatever the size of each."""
  some: list[Document] = []
  chars = 0
  for document in documents:
    some.append(document)
    chars += len(document.text)
    if chars >= _CHARS_PER_CALL:
      yield some
      some, chars = [], 0
  if some:
    yield some


def _records(
  ids: npt.NDArray[np.int32], sequence_length: int, min_tokens: int
) -> npt.NDArray[np.int32]:
  """Cuts one document's ids [any length > 0] into records [pieces, T]."""
  room = sequence_length - 2
  whole, rest = divmod(len(ids), room)
  pieces = whole + (rest > 0 and (rest >= min_tokens or not whole))
  records = np.full((pieces, sequence_length), PAD_ID, np.int32)
  records[:, 0] = CLS_ID
  for row, start in zip(records, range(0, pieces * room, room), strict=True):
    piece = ids[start : start + room]
    row[1 : 1 + len(piece)] = piece
    row[1 + len(piece)] = SEP_ID
  return records
