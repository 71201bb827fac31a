"""Units: who belongs together, and how much of them takes part."""

import collections

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.data import corpus
from dptrain.data import store as store_lib
from dptrain.data import units

T = 8
owners = st.lists(st.integers(0, 6), min_size=1, max_size=60)


def keys_of(owners):
  return np.array([101 + 7 * each for each in owners], np.uint64)


def store_of(count):
  tokens = np.arange(5, 5 + count * T, dtype=np.int32).reshape(count, T)
  return store_lib.RecordStore(tokens)


@given(owners, st.integers(1, 5))
@settings(deadline=None)
def test_a_unit_has_at_most_k_records_and_all_if_they_are_few(owners, k):
  found = units.by_unit(store_of(len(owners)), keys_of(owners), k, b"seed")
  counts = collections.Counter(owners)
  order = list(dict.fromkeys(owners))
  assert found.num_examples == len(order)
  assert found.record_shape[0] == k  # whatever the largest unit holds
  for row, owner in zip(found.members, order, strict=True):
    members = row[row >= 0]
    assert len(members) == min(k, counts[owner])
    assert len(set(members)) == len(members)
    assert {owners[i] for i in members} == {owner}
  np.testing.assert_array_equal(
    np.sort(found.members[found.members >= 0]),
    units.kept(keys_of(owners), k, b"seed"),
  )


@given(owners, st.integers(1, 4), st.integers(0, 6), st.integers(0, 9))
@settings(deadline=None)
def test_what_others_hold_changes_nothing_for_a_unit(owners, k, other, more):
  """One unit has 90 % of the text, or none: the choices of others stay."""
  before = units.by_unit(store_of(len(owners)), keys_of(owners), k, b"seed")
  longer = owners + [other] * more  # the same places for all but the last
  after = units.by_unit(store_of(len(longer)), keys_of(longer), k, b"seed")
  order = list(dict.fromkeys(owners))
  for number, owner in enumerate(order):
    if owner != other:
      one, two = before.members[number], after.members[number]
      assert list(one[one >= 0]) == list(two[two >= 0])


def test_the_choice_is_by_the_seed_and_fair():
  keys = np.full(10, 3, np.uint64)
  chosen = [units.kept(keys, 3, bytes([n])) for n in range(250)]
  share = np.bincount(np.concatenate(chosen), minlength=10) / 250
  assert np.abs(share - 0.3).max() < 4.5 * np.sqrt(0.21 / 250)
  np.testing.assert_array_equal(
    units.kept(keys, 3, b"a"), units.kept(keys, 3, b"a")
  )


def test_missing_records_are_all_padding():
  store = store_of(4)
  found = units.by_unit(store, keys_of([0, 1, 0, 0]), 2, b"seed")
  rows = found.gather(np.array([1, 0]))
  assert rows.shape == (2, 2, T)
  np.testing.assert_array_equal(rows[0, 0], store.tokens[1])
  assert not rows[0, 1].any()
  for wrong in (-1, 2):
    with pytest.raises(ValueError, match="unit indices reach from"):
      found.gather(np.array([wrong]))


def test_the_digest_tells_who_belongs_together():
  store = store_of(4)
  digests = {
    units.by_unit(store, keys_of(o), 2, b"seed").content_digest()
    for o in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 3])
  }
  assert len(digests) == 3


class Spelling:
  def encode(self, texts, num_threads=None):
    return [[5 + ord(c) % 40 for c in text] for text in texts]


def test_a_store_knows_documents_and_users():
  documents = [
    corpus.Document("a:0", "x" * 20, document="a", unit="ann"),
    corpus.Document("a:1", "y" * 3, document="a", unit="ann"),
    corpus.Document("b", "z" * 3, unit="bob"),
    corpus.Document("c", "", unit="nobody: it has no token"),
  ]
  store = store_lib.build_store(documents, Spelling(), T, min_tokens=1)
  counts = collections.Counter(store.documents.tolist())
  assert sorted(counts.values()) == [1, 5]
  assert len(set(store.users.tolist())) == 2
  anonymous = [corpus.Document("a", "x"), corpus.Document("b", "y", unit="b")]
  store = store_lib.build_store(anonymous, Spelling(), T)
  assert store.users is None
  assert len(set(store.documents.tolist())) == 2
