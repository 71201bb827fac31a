"""Units larger than a record: documents or users, with a bounded contribution.

Letters: N records, U units, k records of one unit at most, T sequence length,
n units asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data.special_tokens import PAD_ID
from dptrain.data.store import Store
from dptrain.data.store import check_indices

Keys = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, eq=False)
class UnitStore:
  """A corpus by unit: what is sampled is a unit with all its kept records.

  Formal guarantee: row u of `members` depends on unit u's own records and the
  seed alone. A unit that is replaced by one that contributes nothing changes no
  other row.

  Attributes:
    records: the records.
    members: int64 [U, k] indices of each unit's kept records, -1 where it has
      fewer than k.
  """

  records: Store
  members: npt.NDArray[np.int64]

  @property
  def num_examples(self) -> int:
    """U, the number of units."""
    return len(self.members)

  @property
  def sequence_length(self) -> int:
    """T, the length of every record."""
    return self.records.sequence_length

  @property
  def tokens(self) -> npt.NDArray[np.int32]:
    """All units at once, int32 [U, k, T], in memory."""
    return self.gather(np.arange(self.num_examples))

  def token_range(self) -> tuple[int, int]:
    """The lowest and the largest token of any record."""
    return self.records.token_range()

  @property
  def record_shape(self) -> tuple[int, ...]:
    """Shape of what one index gathers: k, T."""
    return self.members.shape[1], self.sequence_length

  def gather(
    self, indices: npt.NDArray[np.integer[Any]]
  ) -> npt.NDArray[np.int32]:
    """Copies the kept records of units out; a missing one is all padding.

    Args:
      indices: integers [n] in [0, U).

    Returns:
      int32 [n, k, T].

    Raises:
      ValueError: if an index lies outside [0, U).
    """
    indices = np.asarray(indices)
    check_indices(indices, self.num_examples, "unit")
    members = self.members[indices]
    found = np.full((*members.shape, self.sequence_length), PAD_ID, np.int32)
    there = members >= 0
    found[there] = self.records.gather(members[there])
    return found

  def content_digest(self) -> bytes:
    """SHA-256 over records and members."""
    digest = hashlib.sha256(self.records.content_digest())
    digest.update(f"{self.members.shape}".encode())
    digest.update(np.ascontiguousarray(self.members).data)
    return digest.digest()


def by_unit(
  records: Store, keys: Keys, records_per_unit: int, seed: bytes
) -> UnitStore:
  """Groups records by unit and keeps at most k of each.

  Args:
    records: the corpus.
    keys: uint64 [N], equal for the records of one unit.
    records_per_unit: k.
    seed: secret bytes that choose which records are kept.
  """
  chosen, number, place = _bounded(keys, records_per_unit, seed)
  # Not the largest unit's: shapes, and programs made of them, are public.
  members = np.full((int(number.max()) + 1, records_per_unit), -1, np.int64)
  members[number, place] = chosen
  return UnitStore(records, members)


def kept(keys: Keys, records_per_unit: int, seed: bytes) -> npt.NDArray[Any]:
  """Sorted indices int64 of the records that are kept, at most k of a unit.

  Args:
    keys: uint64 [N], equal for the records of one unit.
    records_per_unit: k.
    seed: secret bytes that choose.
  """
  return np.sort(_bounded(keys, records_per_unit, seed)[0])


def _bounded(
  keys: Keys, records_per_unit: int, seed: bytes
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
  """Kept records, their units' numbers, and their places within the unit.

  Units are numbered in the order of their first records, and a record's luck
  depends on its unit's key and on how many of that unit's records came before:
  on nothing of other units.
  """
  _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
  number = np.argsort(np.argsort(first))[inverse]
  order = np.argsort(number, kind="stable")
  starts = np.flatnonzero(np.diff(number[order], prepend=-1))
  lengths = np.diff(np.append(starts, len(keys)))
  ordinal = np.empty(len(keys), np.uint64)
  ordinal[order] = np.arange(len(keys)) - np.repeat(starts, lengths)
  luck = _mixed(keys, ordinal, seed)
  order = np.lexsort((luck, number))
  place = np.arange(len(keys)) - np.repeat(starts, lengths)
  within = place < records_per_unit
  chosen = order[within]
  # In their own order, so that the choice alone is random.
  chosen = chosen[np.lexsort((chosen, number[chosen]))]
  return chosen, number[chosen], place[within]


def _mixed(keys: Keys, ordinal: Keys, seed: bytes) -> Keys:
  """64 bits that look random, from key, ordinal and seed (splitmix64)."""
  low, high = np.frombuffer(hashlib.sha256(seed).digest()[:16], "<u8")
  with np.errstate(over="ignore"):
    x = (keys ^ low) + (ordinal + high) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
      x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
