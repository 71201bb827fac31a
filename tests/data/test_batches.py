"""Physical batches: one shape, every record asked for, once, in order."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.data.batches import check_physical_batch
from dptrain.data.batches import evaluation_batches
from dptrain.data.batches import physical_batches
from dptrain.data.store import RecordStore

STORE = RecordStore(np.arange(1, 161, dtype=np.int32).reshape(20, 8))


@given(
  indices=st.lists(st.integers(0, 19), unique=True),
  size=st.integers(1, 25),
)
def test_every_record_once_in_one_shape(indices, size):
  indices = np.array(indices, np.int64)
  batches = list(physical_batches(STORE, indices, size))
  assert len(batches) == -(-len(indices) // size)
  ids = []
  for batch in batches:
    assert {name: (v.shape, v.dtype) for name, v in batch.items()} == {
      "tokens": ((size, 8), np.int32),
      "example_ids": ((size,), np.int32),
      "is_padding": ((size,), np.bool_),
    }
    true = ~batch["is_padding"]
    assert not batch["tokens"][~true].any()
    assert not batch["example_ids"][~true].any()
    np.testing.assert_array_equal(
      batch["tokens"][true], STORE.tokens[batch["example_ids"][true]]
    )
    ids.extend(batch["example_ids"][true])
  np.testing.assert_array_equal(ids, indices)


@given(
  count=st.integers(0, 20),
  rows=st.lists(st.integers(0, 7), unique=True, min_size=1),
)
def test_a_process_builds_its_own_rows(count, rows):
  whole = list(physical_batches(STORE, np.arange(count), 8))
  own = list(physical_batches(STORE, np.arange(count), 8, np.array(rows)))
  assert len(own) == len(whole)
  for part, batch in zip(own, whole, strict=True):
    for name, array in part.items():
      np.testing.assert_array_equal(array, batch[name][rows])


def test_batches_do_not_share_memory():
  first, second = physical_batches(STORE, np.arange(8), 4)
  for name in first:
    assert not np.shares_memory(first[name], second[name])


def test_evaluation_takes_all_or_an_even_part():
  def ids(limit):
    return [
      int(i)
      for batch in evaluation_batches(STORE, 8, limit)
      for i in batch["example_ids"][~batch["is_padding"]]
    ]

  assert ids(None) == ids(20) == ids(100) == list(range(20))
  assert ids(5) == [0, 4, 8, 12, 16]
  assert ids(1) == [0]
  with pytest.raises(ValueError, match="limit=0"):
    evaluation_batches(STORE, 8, 0)


def test_bad_arguments_are_refused_at_once():
  with pytest.raises(ValueError, match="physical_batch_size=0"):
    physical_batches(STORE, np.arange(3), 0)
  for wrong in (np.zeros(3), np.zeros((3, 1), int)):
    with pytest.raises(ValueError, match="must be integers of shape"):
      physical_batches(STORE, wrong, 4)
  with pytest.raises(ValueError, match="records 0 to 19"):
    list(physical_batches(STORE, np.array([20]), 4))


def test_check_physical_batch():
  check_physical_batch(20, 20)
  with pytest.raises(ValueError, match=r"20 records.*physical_batch_size=21"):
    check_physical_batch(20, 21)
  with pytest.raises(ValueError, match="physical_batch_size=0"):
    check_physical_batch(20, 0)
