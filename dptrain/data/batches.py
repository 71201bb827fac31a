"""Physical batches: any number of records in arrays of one static shape.

Letters: N records in the store, k records asked for, P rows in a physical
batch, T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data.special_tokens import PAD_ID
from dptrain.data.store import Examples


def physical_batches(
  store: Examples,
  indices: npt.NDArray[np.integer[Any]],
  physical_batch_size: int,
  rows: npt.NDArray[np.integer[Any]] | None = None,
) -> Iterator[dict[str, npt.NDArray[Any]]]:
  """Deals records out into ceil(k / P) batches of one shape.

  The last batch is filled up with padding rows. Memory is O(P) per batch.

  Args:
    store: the records.
    indices: integers [k] in [0, N); k may be 0, which gives no batch.
    physical_batch_size: P.
    rows: distinct numbers in [0, P): build these rows of each batch only, in
      this order, as one process of several does. None: all P in order.

  Returns:
    An iterator over dictionaries: `tokens` int32 [P, T] ([P, k, T] if the store
    is one of units with k records); `example_ids` int32
    [P], the rows' indices; `is_padding` bool [P], True for a padding row, whose
    tokens and id are 0 (id 0 also is a true record's: only `is_padding` tells).
    Where `rows` is given its length takes the place of P.

  Raises:
    ValueError: at once if P is below 1 or `indices` is not one row of integers;
      while iterating if an index lies outside the store.
  """
  if physical_batch_size < 1:
    raise ValueError(
      f"physical_batch_size={physical_batch_size} must be at least 1"
    )
  indices = np.asarray(indices)
  if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
    raise ValueError(
      f"record indices are {indices.dtype} of shape {indices.shape}; they must "
      "be integers of shape [k]"
    )
  if rows is None:
    rows = np.arange(physical_batch_size)
  return _deal(store, indices, physical_batch_size, rows)


def _deal(
  store: Examples,
  indices: npt.NDArray[np.integer[Any]],
  size: int,
  rows: npt.NDArray[np.integer[Any]],
) -> Iterator[dict[str, npt.NDArray[Any]]]:
  """Yields the batches of `physical_batches`."""
  for start in range(0, len(indices), size):
    members = indices[start : start + size]
    is_padding = rows >= len(members)
    yield _batch(store, members[rows[~is_padding]], is_padding)


def _batch(
  store: Examples,
  members: npt.NDArray[np.integer[Any]],
  is_padding: npt.NDArray[np.bool_],
) -> dict[str, npt.NDArray[Any]]:
  """One batch, `members` in the rows that are not padding."""
  # Fresh arrays each time: a batch may outlive the next one on a device.
  tokens = np.full((len(is_padding), *store.record_shape), PAD_ID, np.int32)
  tokens[~is_padding] = store.gather(members)
  example_ids = np.zeros(len(is_padding), np.int32)
  example_ids[~is_padding] = members
  return {
    "tokens": tokens,
    "example_ids": example_ids,
    "is_padding": is_padding,
  }


def batches_of_shares(
  store: Examples,
  shares: Sequence[npt.NDArray[np.integer[Any]]],
  rows_per_share: int,
  num_batches: int,
) -> Iterator[dict[str, npt.NDArray[Any]]]:
  """Deals out a sample of which each shard of a mesh has a share.

  Args:
    store: the records.
    shares: indices in [0, N), of each shard that this process builds rows for.
    rows_per_share: rows of a physical batch that a shard has.
    num_batches: the same for all shards, and enough for each share.

  Yields:
    Batches as those of `physical_batches`, the shards' rows one after another.
  """
  for number in range(num_batches):
    begin = number * rows_per_share
    parts = [share[begin : begin + rows_per_share] for share in shares]
    places = np.arange(rows_per_share)
    is_padding = np.concatenate([places >= len(part) for part in parts])
    yield _batch(store, np.concatenate(parts), is_padding)


def evaluation_batches(
  store: Examples, physical_batch_size: int, limit: int | None = None
) -> Iterator[dict[str, npt.NDArray[Any]]]:
  """Deals out the store, or an evenly spaced part of it, always the same.

  Args:
    store: the records.
    physical_batch_size: P.
    limit: the most records to take; None for all.

  Returns:
    An iterator as that of `physical_batches`.

  Raises:
    ValueError: if P or the limit is below 1.
  """
  if limit is not None and limit < 1:
    raise ValueError(
      f"limit={limit} must be at least 1; leave it None for every record"
    )
  total = store.num_examples
  taken = total if limit is None else min(limit, total)
  # The first records alone would all come from the first few documents.
  indices = np.arange(taken, dtype=np.int64) * total // taken
  return physical_batches(store, indices, physical_batch_size)


def check_physical_batch(num_examples: int, physical_batch_size: int) -> None:
  """Refuses a corpus that cannot fill one physical batch.

  Args:
    num_examples: N.
    physical_batch_size: P.

  Raises:
    ValueError: if P is below 1 or exceeds N.
  """
  if physical_batch_size < 1:
    raise ValueError(
      f"physical_batch_size={physical_batch_size} must be at least 1"
    )
  if num_examples < physical_batch_size:
    raise ValueError(
      f"the corpus has {num_examples} records, fewer than "
      f"physical_batch_size={physical_batch_size}; lower physical_batch_size, "
      "shorten sequence_length or give more text"
    )
