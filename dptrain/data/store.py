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
from typing import Any, Final, Protocol

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
# A longer text is tokenised in parts: its lattice would take many gigabytes.
_LONGEST_TEXT: Final = 1_000_000
_SPACE: Final = " \n\t\r"
EMPTY_CORPUS: Final = (
  "the corpus is empty: no document in it holds a token; check the task's "
  "files and the split's name"
)


class Examples(Protocol):
  """What is sampled, by number: records, or units of them."""

  @property
  def num_examples(self) -> int:
    """How many there are."""

  @property
  def sequence_length(self) -> int:
    """T, the length of every record."""

  @property
  def record_shape(self) -> tuple[int, ...]:
    """Shape of what one index gathers."""

  def gather(
    self, indices: npt.NDArray[np.integer[Any]]
  ) -> npt.NDArray[np.int32]:
    """Copies examples out: see `RecordStore.gather`."""

  def content_digest(self) -> bytes:
    """Names the examples and their order."""


class Store(Examples, Protocol):
  """Records by number: in memory (`RecordStore`) or on disk."""

  @property
  def tokens(self) -> npt.NDArray[np.int32]:
    """All records, int32 [N, T], in memory."""

  @property
  def documents(self) -> npt.NDArray[np.uint64] | None:
    """As in `RecordStore`."""

  @property
  def users(self) -> npt.NDArray[np.uint64] | None:
    """As in `RecordStore`."""

  def token_range(self) -> tuple[int, int]:
    """The lowest and the largest token of any record."""

  def subset(self, indices: npt.NDArray[np.integer[Any]]) -> Examples:
    """Some of the records: see `RecordStore.subset`."""


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
    check_indices(indices, self.num_examples)
    return self.tokens[indices]

  def token_range(self) -> tuple[int, int]:
    """The lowest and the largest token of any record."""
    return int(self.tokens.min()), int(self.tokens.max())

  def content_digest(self) -> bytes:
    """SHA-256 over shape, dtype and bytes: equal for equal stores alone."""
    digest = begun_digest(*self.tokens.shape)
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
  check_cut(sequence_length, min_tokens)
  blocks: list[npt.NDArray[np.int32]] = []
  keys: list[tuple[Document, int]] = []
  for some in _chunks(documents):
    texts = [document.text for document in some]
    cut = cut_records(texts, vocabulary, sequence_length, min_tokens)
    for document, records in zip(some, cut, strict=True):
      if len(records):
        blocks.append(records)
        keys.append((document._replace(text=""), len(records)))
  if not blocks:
    raise ValueError(EMPTY_CORPUS)
  return RecordStore(
    np.concatenate(blocks),
    hashed_keys([(each.document or each.source, n) for each, n in keys]),
    hashed_keys([(each.unit, n) for each, n in keys])
    if all(each.unit for each, _ in keys)
    else None,
  )


def check_indices(
  indices: npt.NDArray[np.integer[Any]],
  num_examples: int,
  what: str = "record",
) -> None:
  """Refuses numbers of examples that a store does not hold.

  Args:
    indices: integers, of any shape.
    num_examples: how many there are.
    what: what one of them is called.

  Raises:
    ValueError: if an index lies outside [0, num_examples).
  """
  # NumPy would read a negative index from the end without a word.
  if indices.size and not (indices.min() >= 0 and indices.max() < num_examples):
    raise ValueError(
      f"{what} indices reach from {indices.min()} to {indices.max()}; the store"
      f" holds {what}s 0 to {num_examples - 1}"
    )


def begun_digest(num_examples: int, sequence_length: int) -> Any:
  """A `content_digest` that awaits the records, int32, in order."""
  shape, dtype = (num_examples, sequence_length), np.dtype(np.int32)
  return hashlib.sha256(f"{shape} {dtype.str}".encode())


def check_cut(sequence_length: int, min_tokens: int) -> None:
  """Raises ValueError for lengths that no record can have."""
  if sequence_length < _SHORTEST_SEQUENCE:
    raise ValueError(
      f"sequence_length={sequence_length} must be at least "
      f"{_SHORTEST_SEQUENCE}, to leave room between [CLS] and [SEP]"
    )
  if min_tokens < 1:
    raise ValueError(
      f"min_tokens={min_tokens} must be at least 1; 1 keeps every piece"
    )


def cut_records(
  texts: list[str],
  vocabulary: Vocabulary,
  sequence_length: int,
  min_tokens: int,
  num_threads: int | None = None,
) -> Iterator[npt.NDArray[np.int32]]:
  """Cuts documents into records, as `build_store` says.

  A text of more than a million characters is tokenised in parts that end before
  a space, or after a million characters without one.

  Args:
    texts: one per document.
    vocabulary: the vocabulary.
    sequence_length: T.
    min_tokens: as in `build_store`.
    num_threads: of the tokenisation; None for all cores.

  Returns:
    An iterator over int32 [pieces, T], one array per text; pieces may be 0.
  """
  for ids in _encoded(texts, vocabulary, num_threads):
    yield _records(ids, sequence_length, min_tokens)


def _encoded(
  texts: list[str], vocabulary: Vocabulary, num_threads: int | None
) -> Iterator[npt.NDArray[np.int32]]:
  """Yields each text's ids."""
  if all(len(text) <= _LONGEST_TEXT for text in texts):
    for ids in vocabulary.encode(texts, num_threads):
      yield np.asarray(ids, np.int32)
    return
  for text in texts:
    # Part by part: as Python's numbers, ids take ten times as much memory.
    yield np.concatenate(
      [
        np.asarray(vocabulary.encode([part], num_threads)[0], np.int32)
        for part in _parts(text)
      ]
    )


def _parts(text: str) -> Iterator[str]:
  """Cuts a very long text where tokens end anyway, if it can."""
  begin = 0
  while len(text) - begin > _LONGEST_TEXT:
    end = begin + _LONGEST_TEXT
    space = max(text.rfind(each, begin + 1, end) for each in _SPACE)
    end = space if space > begin else end
    yield text[begin:end]
    begin = end
  yield text[begin:] if begin else text


def hashed_keys(counted: list[tuple[str, int]]) -> npt.NDArray[np.uint64]:
  """64 bits of each key's hash, as often as it has records.

  Args:
    counted: keys with their numbers of records.

  Returns:
    uint64 [sum of the numbers].
  """
  hashes = [
    hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()[:8]
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
  """Cuts one document's ids [any length] into records [pieces, T]."""
  room = sequence_length - 2
  whole, rest = divmod(len(ids), room)
  tail = rest > 0 and (rest >= min_tokens or not whole)
  records = np.full((whole + tail, sequence_length), PAD_ID, np.int32)
  records[:, 0] = CLS_ID
  records[:whole, 1:-1] = ids[: whole * room].reshape(whole, room)
  records[:whole, -1] = SEP_ID
  if tail:
    records[-1, 1 : 1 + rest] = ids[whole * room :]
    records[-1, 1 + rest] = SEP_ID
  return records
