"""One corpus for several runs: no unit is in two shards, whatever changes."""

import dataclasses

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.data import disjoint_shards
from dptrain.data.store import RecordStore

KEY = b"secret"
RELATIONS = ("zero_out", "replace_one", "add_or_remove_one")
lists = st.lists(st.integers(0, 7), min_size=1, max_size=30)
counts = st.integers(2, 5)
everything = settings(deadline=None, max_examples=60)


def store(owners, seed=0):
  """One record for each owner; equal ones are equal in every token."""
  rows = np.random.default_rng(seed).integers(5, 99, (32, 8), np.int32)
  return RecordStore(rows[np.array(owners)])


def keys_of(owners):
  return np.array(owners, np.uint64) * np.uint64(7919) + np.uint64(3)


def shard(
  index, count, records, keys, relation="zero_out", secret=KEY, **options
):
  made = disjoint_shards.ShardSettings(index, count, "folder")
  try:
    return disjoint_shards.own_records(
      made, records, keys, relation, secret, **options
    )
  except ValueError as error:
    if "is empty" not in str(error):
      raise
    return np.empty(0, np.int64)


def places(count, records, keys, relation, secret=KEY, **options):
  """The shard of each record; fails unless each has exactly one."""
  found = np.full(records.num_examples, -1)
  for index in range(count):
    own = shard(index, count, records, keys, relation, secret, **options)
    assert (np.diff(own) > 0).all()
    assert (found[own] == -1).all()
    found[own] = index
  assert (found >= 0).all()
  return found


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("by_key", [True, False])
@given(owners=lists, count=counts)
@everything
def test_shards_partition_the_records(relation, by_key, owners, count):
  keys = keys_of(owners) if by_key else None
  found = places(count, store(owners), keys, relation)
  if by_key or relation == "add_or_remove_one":
    # Units stay whole; equal records are one unit's, as far as anybody knows.
    for owner in set(owners):
      assert len(set(found[np.array(owners) == owner])) == 1


@pytest.mark.parametrize("relation", RELATIONS)
@given(
  owners=lists,
  count=counts,
  which=st.integers(0, 29),
  others=st.lists(st.integers(0, 31), max_size=3),
  seed=st.integers(1, 99),
)
@everything
def test_a_unit_with_a_key_moves_no_other(
  relation, owners, count, which, others, seed
):
  # It has other content, more records or fewer, none at all, or another key
  # (that of a unit that was not there) under the relation that says so.
  unit = owners[which % len(owners)]
  kept = [owner for owner in owners if owner != unit]
  replaced = [] if relation == "add_or_remove_one" else [unit] * len(others)
  changed = [*kept, *replaced]
  before = places(count, store(owners), keys_of(owners), relation)
  told = {owner: before[owners.index(owner)] for owner in owners}
  if changed:
    other = store(changed, seed)  # no token is as it was
    after = places(count, other, keys_of(changed), relation)
    assert [told[owner] for owner in changed] == after.tolist()


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
@given(
  owners=lists, count=counts, which=st.integers(0, 29), seed=st.integers(1, 99)
)
@everything
def test_a_record_inherits_the_place_of_the_one_that_it_replaces(
  relation, owners, count, which, seed
):
  records = store(owners)
  before = places(count, records, None, relation)
  tokens = records.tokens.copy()
  tokens[which % len(owners)] = store([0], seed).tokens[0]
  after = places(count, RecordStore(tokens), None, relation)
  np.testing.assert_array_equal(before, after)


@given(owners=lists, count=counts, which=st.integers(0, 29))
@everything
def test_a_record_that_is_taken_away_moves_no_other(owners, count, which):
  relation = "add_or_remove_one"
  before = places(count, store(owners), None, relation)
  which %= len(owners)
  kept = [*owners[:which], *owners[which + 1 :]]
  if kept:
    after = places(count, store(kept), None, relation)
    np.testing.assert_array_equal(np.delete(before, which), after)


@given(owners=lists, count=counts, which=st.integers(0, 29))
@everything
def test_a_numbered_document_that_is_taken_away_moves_no_other(
  owners, count, which
):
  """Keys of documents without a name are their numbers: those behind move."""
  rows = store(range(32)).tokens[np.array(owners)]
  # Records of a document differ; which document each is of, `owners` tells.
  rows = rows + np.arange(len(owners), dtype=np.int32)[:, None]
  owners = np.array(owners)
  own = owners[which % len(owners)]
  before = _shard_of_each(rows, owners, np.arange(len(owners)), count)
  stay = np.flatnonzero(owners != own)
  if len(stay):
    after = _shard_of_each(rows, owners, stay, count)
    np.testing.assert_array_equal(before[stay], after)
    for owner in set(owners.tolist()):
      assert len(set(before[owners == owner])) == 1


def _shard_of_each(rows, owners, kept, count):
  numbers = np.unique(owners[kept], return_inverse=True)[1]
  records, keys = RecordStore(rows[kept]), keys_of(numbers)
  relation = "add_or_remove_one"
  return places(count, records, keys, relation, keys_may_move=True)


def test_content_is_read_to_the_last_token_and_in_its_order():
  rows = np.arange(5, 5 + 64 * 8, dtype=np.int32).reshape(64, 8)
  for change in (lambda x: np.roll(x, 1, axis=1), _other_end):
    both = RecordStore(np.concatenate([rows, change(rows)]))
    found = places(16, both, None, "add_or_remove_one")
    assert (found[:64] != found[64:]).mean() > 0.5


def _other_end(rows):
  return np.concatenate([rows[:, :-1], rows[:, -1:] + 1], axis=1)


@pytest.mark.parametrize("keys", [keys_of(range(500)), None])
def test_another_key_gives_another_division(keys):
  records = store([0] * 500)
  one, same, two = (
    places(4, records, keys, "zero_out", secret)
    for secret in (KEY, KEY, b"another")
  )
  np.testing.assert_array_equal(one, same)
  assert 0.1 < (one == two).mean() < 0.4  # of a quarter by chance
  # Each division is even, and tells nothing of the order.
  assert np.bincount(one).min() > 80


def test_neighbouring_numbers_of_shards_are_other_divisions():
  records = store([0] * 500)
  two, four = (places(n, records, None, "zero_out") for n in (2, 4))
  assert len(set(zip(two, four, strict=True))) >= 4


def test_a_large_corpus_is_divided_by_its_keys_alone():
  number = 3_000_000
  keys = np.arange(number, dtype=np.uint64)

  class Large:
    """Nothing of the records themselves may be read."""

    num_examples = number

  own = shard(1, 8, Large(), keys)
  assert abs(len(own) - number / 8) < 5 * (number / 8) ** 0.5
  np.testing.assert_array_equal(own, shard(1, 8, Large(), None))


def test_contents_of_more_rows_than_are_read_at_once(monkeypatch):
  owners = list(range(20))
  whole = places(3, store(owners), None, "add_or_remove_one")
  monkeypatch.setattr(disjoint_shards, "_ROWS_AT_ONCE", 7)
  parts = places(3, store(owners), None, "add_or_remove_one")
  np.testing.assert_array_equal(whole, parts)


def test_one_shard_is_the_whole_corpus():
  records = store([1, 2, 3])
  made = disjoint_shards.ShardSettings()
  own = disjoint_shards.own_records(made, records, None, "zero_out", KEY)
  assert own.tolist() == [0, 1, 2]
  assert disjoint_shards.described(made, "c", "k", "user") is None


def test_an_empty_shard_is_refused():
  records = store([1])
  sizes = [
    len(shard(index, 3, records, None, "zero_out")) for index in range(3)
  ]
  assert sorted(sizes) == [0, 0, 1]
  empty = disjoint_shards.ShardSettings(sizes.index(0), 3, "folder")
  with pytest.raises(ValueError, match=r"is empty: .* lower it"):
    disjoint_shards.own_records(empty, records, None, "zero_out", KEY)


@pytest.mark.parametrize(
  ("settings_of", "told"),
  [
    ({"count": 0}, r"ShardSettings\.count=0 must be an int of 1 or more"),
    ({"count": True}, r"ShardSettings\.count=True"),
    ({"count": 2.0}, r"ShardSettings\.count=2\.0"),
    ({"index": -1}, r"ShardSettings\.index=-1"),
    ({"index": 1}, r"index=1 must lie below ShardSettings\.count=1"),
    ({"index": 2, "count": 2, "key_folder": "x"}, "numbered from 0"),
    ({"count": 2}, r"key_folder is not set: name one folder"),
    ({"count": 2, "key_folder": ""}, r"key_folder is not set"),
    (
      {"count": 2, "key_folder": 3},
      r"key_folder=3 must be the name of a folder",
    ),
  ],
)
def test_settings_that_make_no_shard(settings_of, told):
  with pytest.raises(ValueError, match=told):
    disjoint_shards.ShardSettings(**settings_of)


def test_a_ledger_tells_all_that_decides_a_shard():
  made = disjoint_shards.ShardSettings(1, 2, "folder")
  told = disjoint_shards.described(made, "c", "k", "user")
  shard_of = {"index": 1, "count": 2, "corpus": "c", "key": "k", "by": "user"}
  assert told == shard_of
  moved = dataclasses.replace(made, key_folder="elsewhere")
  assert disjoint_shards.described(moved, "c", "k", "user") == told
