"""Records: fixed length, one document each, nothing lost but short tails."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.data.corpus import Document
from dptrain.data.special_tokens import CLS_ID
from dptrain.data.special_tokens import PAD_ID
from dptrain.data.special_tokens import SEP_ID
from dptrain.data.store import RecordStore
from dptrain.data.store import build_store


class Spelling:
  """Stands in for a vocabulary: a text is its ids, written out."""

  def encode(self, texts: list[str], _=None) -> list[list[int]]:
    return [[int(word) for word in text.split()] for text in texts]


def naive_records(ids: list[int], length: int, shortest: int):
  """Cuts one document the slow way."""
  pieces = []
  while ids:
    pieces.append(ids[: length - 2])
    ids = ids[length - 2 :]
  full = [each for each in pieces if len(each) == length - 2]
  kept = [each for each in pieces[len(full) :] if len(each) >= shortest]
  if not full:
    kept = pieces
  rows = [[CLS_ID, *each, SEP_ID] for each in full + kept]
  return [row + [PAD_ID] * (length - len(row)) for row in rows]


@given(
  lengths=st.lists(st.integers(0, 70), min_size=1, max_size=8),
  sequence_length=st.integers(8, 32),
  min_tokens=st.integers(1, 12),
)
def test_matches_the_naive_cut(lengths, sequence_length, min_tokens):
  # Document i holds only ids that no other document holds.
  ids = [
    [1000 * (i + 1) + j for j in range(length)]
    for i, length in enumerate(lengths)
  ]
  documents = [
    Document(str(i), " ".join(map(str, each))) for i, each in enumerate(ids)
  ]
  expected = [
    row
    for each in ids
    for row in naive_records(each, sequence_length, min_tokens)
  ]
  if not expected:
    with pytest.raises(ValueError, match="corpus is empty"):
      build_store(documents, Spelling(), sequence_length, min_tokens=min_tokens)
    return
  store = build_store(
    documents, Spelling(), sequence_length, min_tokens=min_tokens
  )
  np.testing.assert_array_equal(store.tokens, expected)
  for row in store.tokens:
    assert len({token // 1000 for token in row if token >= 1000}) == 1


def test_many_encoding_calls_give_what_one_gives(
  documents, vocabulary, monkeypatch
):
  whole = build_store(documents, vocabulary, 16)
  monkeypatch.setattr("dptrain.data.store._CHARS_PER_CALL", 500)
  assert build_store(iter(documents), vocabulary, 16).content_digest() == (
    whole.content_digest()
  )
  assert whole.tokens.dtype == np.int32
  assert whole.sequence_length == 16
  assert whole.num_examples == len(whole.tokens)


def test_one_text_comes_back(documents, vocabulary):
  store = build_store(documents[:1], vocabulary, 512)
  assert vocabulary.decode(store.tokens[0]) == documents[0].text


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"sequence_length": 7}, "sequence_length=7 must be at least 8"),
    ({"sequence_length": 8, "min_tokens": 0}, "min_tokens=0"),
  ],
)
def test_settings_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=message):
    build_store([Document("a", "5")], Spelling(), **arguments)


@pytest.mark.parametrize("documents", [[], [Document("a", "")]])
def test_empty_corpus(documents):
  with pytest.raises(ValueError, match="corpus is empty"):
    build_store(documents, Spelling(), 8)


def test_digest_tells_tokens_and_shapes_apart():
  tokens = np.arange(24, dtype=np.int32).reshape(3, 8)
  digest = RecordStore(tokens).content_digest()
  assert digest == RecordStore(tokens.copy(order="F")).content_digest()
  assert len(digest) == 32
  changed = tokens.copy()
  changed[2, 7] += 1
  assert RecordStore(changed).content_digest() != digest
  assert RecordStore(tokens.reshape(2, 12)).content_digest() != digest


def test_gather_copies_rows_and_refuses_strangers():
  store = RecordStore(np.arange(24, dtype=np.int32).reshape(3, 8))
  rows = store.gather(np.array([2, 0, 2]))
  np.testing.assert_array_equal(rows, store.tokens[[2, 0, 2]])
  rows[0, 0] = -1
  assert store.tokens[2, 0] == 16
  for stranger in (-1, 3):
    with pytest.raises(ValueError, match=f"{stranger}.*records 0 to 2"):
      store.gather(np.array([stranger]))


def test_store_is_read_only_and_typed():
  tokens = np.zeros((2, 8), np.int32)
  store = RecordStore(tokens)
  with pytest.raises(ValueError, match="read-only"):
    store.tokens[0, 0] = 1
  tokens[0, 0] = 1  # The caller's own array stays writable.
  for wrong in (tokens.astype(np.int64), tokens[0]):
    with pytest.raises(ValueError, match="needs int32"):
      RecordStore(wrong)
  with pytest.raises(ValueError, match="holds no record"):
    RecordStore(tokens[:0])
