"""One corpus for several runs: a keyed hash gives each unit to one of them.

Letters: N records, S shards, T sequence length, n records of one shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data.store import Store

Keys = npt.NDArray[np.uint64]
_ROWS_AT_ONCE = 1 << 16
NUMBERS_MOVE = "add_or_remove_one"


@dataclasses.dataclass(frozen=True)
class ShardSettings:
  """Which part of the corpus a run trains on.

  Attributes:
    index: of this run's shard, from 0.
    count: S; 1 trains on the whole corpus.
    key_folder: folder with the secret key of the hash, the same for all runs
      that share the corpus. The first run makes it. Needed if S > 1.
  """

  index: int = 0
  count: int = 1
  key_folder: str | None = None

  def __post_init__(self) -> None:
    for name, least in (("count", 1), ("index", 0)):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
          f"ShardSettings.{name}={value!r} must be an int of {least} or more."
        )
    if self.index >= self.count:
      raise ValueError(
        f"ShardSettings.index={self.index} must lie below"
        f" ShardSettings.count={self.count}: shards are numbered from 0."
      )
    if self.count > 1 and not self.key_folder:
      raise ValueError(
        f"ShardSettings.count={self.count}, but ShardSettings.key_folder is not"
        " set: name one folder for all runs that share the corpus; the first of"
        " them draws the key of the hash there."
      )
    if not isinstance(self.key_folder, (str, type(None))):
      raise ValueError(
        f"ShardSettings.key_folder={self.key_folder!r} must be the name of a"
        " folder."
      )


def own_records(
  settings: ShardSettings,
  records: Store,
  keys: Keys | None,
  relation: str,
  hash_key: bytes,
  *,
  keys_may_move: bool = False,
) -> npt.NDArray[np.int64]:
  """Which records belong to this run's shard.

  Formal guarantee: unit: the run's. Which shard a unit is in is a function of
  that unit and of the key alone: no unit is in two shards, and replacing one
  unit leaves all others where they are. A user keeps its key, whatever its
  content. A record is known by its number, which a record that takes its place
  inherits, and a document by its key, which may be its number. Under
  "add_or_remove_one", where numbers move, both are known by their content.
  Public: nothing; how many units a shard has is as public as the size of its
  corpus.

  Args:
    settings: index and number of shards.
    records: the whole corpus.
    keys: uint64 [N], equal for the records of one unit; None if the unit is the
      record.
    relation: of the plan, a key of `accounting.RELATIONS`.
    hash_key: secret bytes.
    keys_may_move: whether keys may be numbers, which move when a unit before
      them is added or removed.

  Returns:
    Sorted int64 [n].

  Raises:
    ValueError: the shard is empty.
  """
  if settings.count == 1:
    return np.arange(records.num_examples)
  if relation == NUMBERS_MOVE and (keys is None or keys_may_move):
    keys = _content_keys(records, keys)
  elif keys is None:
    keys = np.arange(records.num_examples, dtype=np.uint64)
  shard = _mixed(keys, hash_key) % np.uint64(settings.count)
  found = np.flatnonzero(shard == settings.index)
  if not len(found):
    raise ValueError(
      f"shard {settings.index} of {settings.count} is empty: the corpus has too"
      " few units for ShardSettings.count; lower it."
    )
  return found


def _content_keys(records: Store, units: Keys | None) -> Keys:
  """uint64 [N], equal for records of units of equal tokens.

  Args:
    records: the whole corpus.
    units: uint64 [N], equal for the records of one unit; None: each is one.
  """
  found = np.empty(records.num_examples, np.uint64)
  for begin in range(0, records.num_examples, _ROWS_AT_ONCE):
    end = min(begin + _ROWS_AT_ONCE, records.num_examples)
    tokens = records.gather(np.arange(begin, end)).astype(np.uint64)
    key = np.zeros(end - begin, np.uint64)
    for column in tokens.T:
      key = _splitmix(key ^ column)
    found[begin:end] = key
  if units is None:
    return found
  order = np.argsort(units, kind="stable")
  _, starts, counts = np.unique(
    units[order], return_index=True, return_counts=True
  )
  place = np.arange(len(order)) - np.repeat(starts, counts)
  parts = _splitmix(found[order] ^ _splitmix(place.astype(np.uint64)))
  joined = np.empty_like(found)
  joined[order] = np.repeat(np.add.reduceat(parts, starts), counts)
  return joined


def _mixed(keys: Keys, secret: bytes) -> Keys:
  """64 bits that look random, from each key and the secret."""
  words = np.frombuffer(hashlib.sha256(secret).digest()[:24], "<u8")
  x = keys
  for word in words:
    x = _splitmix(x ^ word)
  return x


def _splitmix(x: Keys) -> Keys:
  with np.errstate(over="ignore"):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
      x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  return x ^ (x >> np.uint64(31))


def described(
  settings: ShardSettings, corpus: str, key: str, by: str
) -> dict[str, Any] | None:
  """A shard as ledgers tell of it; None for a whole corpus.

  Args:
    settings: index and number.
    corpus: fingerprint of the whole corpus, keyed with the hash's key.
    key: fingerprint of that key.
    by: what it hashes: shards by document and by user share units.
  """
  if settings.count == 1:
    return None
  return {
    "index": settings.index,
    "count": settings.count,
    "corpus": corpus,
    "key": key,
    "by": by,
  }
