"""Private vocabularies: words, models that encode every text, papers."""

import dataclasses
import random

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dptrain.data import private_vocabulary
from dptrain.data import special_tokens
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.data import wordpiece
from dptrain.data import words
from dptrain.data.corpus import Document
from dptrain.privacy import keys
from dptrain.privacy.word_counts import WordRelease

SEED = keys.fixed_seed(0)
RELEASE = WordRelease(
  words_per_unit=10, noise_multiplier=1.0, failure_prob=1e-6
)
COUNTS = {
  " the": 900,
  " working": 300,
  " worked": 250,
  " works": 200,
  " (": 150,
  "work": 90,
  ".": 800,
  ",": 700,
  " na\u00efve": 40,
  " 12": 30,
}


def learned(size=300, model_type="bpe", counts=COUNTS, **options):
  of = vocabulary_lib.VocabularySettings(
    size=size, model_type=model_type, character_coverage=1.0
  )
  return vocabulary_lib.train_on_word_counts(counts, of, **options)


@pytest.fixture(scope="module")
def vocabulary():
  return learned()


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("The  cat,\nsat.", [" The", " cat", ",", " sat", "."]),
    ("(foo_bar 12abc)", [" (", "foo", "_", "bar", " 12", "abc", ")"]),
    ("\ufb01ne \u2581 x", [" fine", " x"]),
    (
      "\u0928\u092e\u0938\u094d\u0924\u0947",
      [" \u0928\u092e\u0938\u094d\u0924\u0947"],
    ),
    ("\u65e5\u672c go", [" \u65e5", "\u672c", " go"]),
    (f"a {'b' * 64} c", [" a", " c"]),
    ("", []),
    (" \t\n", []),
  ],
)
def test_words(text, expected):
  assert list(words.Splitter()(text)) == expected


def test_case_is_folded_if_asked():
  assert list(words.Splitter(lowercase=True)("Hi THERE")) == [" hi", " there"]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_a_word_fits_a_line_of_the_table(text):
  for word in words.Splitter()(text):
    assert 1 <= len(word) <= words.MAX_WORD_CHARS
    assert word.strip(" ")
    assert not set("\t\r\n") & set(word)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_model_of_the_words_alone(model_type):
  made = learned(283, model_type)
  assert made.size == 283
  assert learned(283, model_type).fingerprint == made.fingerprint
  for token, piece in enumerate(special_tokens.SPECIAL_PIECES):
    assert made.piece(token) == piece
  spelled = {made.piece(i) for i in range(5, made.size) if not made.is_byte(i)}
  text = "\n".join(COUNTS).replace(" ", "\u2581")
  assert all(piece in text for piece in spelled)
  (ids,) = made.encode(["the work."])
  assert made.decode(ids) == "the work."


def test_frequent_words_become_pieces(vocabulary):
  pieces = {vocabulary.piece(i) for i in range(vocabulary.size)}
  assert {"\u2581the", "\u2581work", "\u2581working", "work"} <= pieces


def test_frequencies_are_read():
  turned = {w: 1000 - n for w, n in COUNTS.items()}
  assert learned().fingerprint != learned(counts=turned).fingerprint


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_every_text_is_encodable(text):
  made = _cached()
  (ids,) = made.encode([text])
  assert special_tokens.UNK_ID not in ids
  normal = words.Splitter()._normalizer.normalize(text)
  assert made.decode(ids) == normal.replace("\u2581", " ").removeprefix(" ")


def _cached(made=[]):  # noqa: B006
  if not made:
    made.append(learned())
  return made[0]


def test_lower_case_holds_for_encoding():
  folded = {word.lower(): n for word, n in COUNTS.items()}
  made = learned(counts=folded, lowercase=True)
  (upper, lower) = made.encode(["THE Work", "the work"])
  assert upper == lower


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_few_words_are_filled_up(model_type):
  made = learned(4000, model_type)
  assert made.size == 4000
  unused = [i for i in range(made.size) if made.is_unused(i)]
  assert unused == list(range(unused[0], 4000))
  assert 261 < unused[0] < 400
  assert made.piece(unused[0]) == "[unused1]"
  (ids,) = made.encode(["the work [unused1]"])
  assert not set(ids) & set(unused)
  assert made.decode(ids) == "the work [unused1]"
  assert "unused" not in wordpiece.vocab_txt(made)


def test_too_small():
  with pytest.raises(ValueError, match=r"size=265 is too small"):
    learned(265)


def documents(number=400):
  draw = random.Random(1)
  found = [
    Document(f"d{i}", " ".join(draw.choices(["the", "cat", "sat", "on"], k=40)))
    for i in range(number)
  ]
  return [*found, Document("secret", "the hunter2 hunter2 password xyzzy")]


def count(found, **options):
  fields = {"unit": "document", "words_per_unit": 10, "seed": SEED}
  return private_vocabulary.count_words(found, **(fields | options))


def test_no_word_of_one_document_is_in_the_vocabulary():
  counts = count(documents())
  assert counts[" hunter"] == 1
  for number in range(100):
    noisy, told = private_vocabulary.release_words(
      counts, RELEASE, unit="document", seed=keys.fixed_seed(number)
    )
    assert noisy.keys() == {" the", " cat", " sat", " on"}
    assert told.words_kept == 4


def test_documents_and_users():
  class Keyed(Document):
    document = "book"
    unit = "ann"

  pages = [Keyed(f"page {i}", "word") for i in range(5)]
  assert count(pages) == {" word": 1}
  assert count(pages, unit="user") == {" word": 1}
  plain = [Document(f"page {i}", "word") for i in range(5)]
  assert count(plain) == {" word": 5}
  with pytest.raises(ValueError, match=r"'page 0' has no user: --unit=user"):
    count(plain, unit="user")
  with pytest.raises(ValueError, match=r"unit='page'"):
    count(plain, unit="page")


def test_no_word_is_enough():
  with pytest.raises(ValueError, match=r"no word is held .* must exceed 1\d"):
    private_vocabulary.release_words(
      {"a": 1}, RELEASE, unit="document", seed=SEED
    )


@pytest.fixture
def saved(tmp_path, vocabulary):
  """A model's path, with its papers."""
  path = tmp_path / "new" / "v.model"
  noisy, told = private_vocabulary.release_words(
    COUNTS, RELEASE, unit="document", seed=SEED, task="t", split="train"
  )
  private_vocabulary.write_words(noisy, told, path)
  private_vocabulary.save(vocabulary, told, path)
  return path


def test_papers_are_read_again(saved, vocabulary):
  told = private_vocabulary.read_release(saved)
  assert told.fingerprint == vocabulary.fingerprint
  assert (told.task, told.split, told.unit) == ("t", "train", "document")
  assert told.fixed_seed
  noisy, again = private_vocabulary.read_words(f"{saved}.words.tsv")
  assert noisy.keys() <= COUNTS.keys()
  assert again == told
  assert private_vocabulary.read_release(saved.with_name("none")) is None


def test_the_release_as_a_plan_prices_it(saved):
  told = private_vocabulary.read_release(saved)
  other = told.other("document", "zero_out")
  assert other.noise_multiplier == told.noise_multiplier == 1.0
  assert other.failure_prob == 1e-6
  assert other.name == told.words
  part = told.other("record", "zero_out")
  assert part.noise_multiplier == pytest.approx(1 / 2**0.5)
  with pytest.raises(ValueError, match=r"does not protect a user"):
    told.other("user", "zero_out")


def test_papers_of_another_vocabulary(saved):
  learned(290).save(saved)
  with pytest.raises(ValueError, match=r"describes another vocabulary"):
    private_vocabulary.read_release(saved)


@pytest.mark.parametrize(
  ("right", "wrong"),
  [
    ('"unit": "document"', '"unit": "page"'),
    ('"noise_multiplier": 1.0', '"noise_multiplier": -1.0'),
    ('"failure_prob"', '"failure"'),
    ("{", "["),
  ],
)
def test_damaged_papers(saved, right, wrong):
  path = private_vocabulary.release_path(saved)
  text = path.read_text()
  assert right in text
  path.write_text(text.replace(right, wrong))
  with pytest.raises(ValueError, match=r"release\.json is damaged"):
    private_vocabulary.read_release(saved)


def test_damaged_words(saved):
  path = private_vocabulary.words_path(saved)
  path.write_text(path.read_text() + "more\t3\n")
  with pytest.raises(ValueError, match=r"describes other counts"):
    private_vocabulary.read_words(path)
  path.write_text("no table")
  with pytest.raises(ValueError, match=r"is no table"):
    private_vocabulary.read_words(path)


def test_wordpieces(vocabulary):
  tokens = wordpiece.vocab_txt(vocabulary).splitlines()
  assert tuple(tokens[:5]) == special_tokens.SPECIAL_PIECES
  assert len(tokens) == len(set(tokens))
  assert {"the", "working", "##work", "e", "##e", ".", "##."} <= set(tokens)
  assert not any("\u2581" in token or "<0x" in token for token in tokens)

  def cut(word):
    """BERT's greedy longest match."""
    pieces, start = [], 0
    while start < len(word):
      for end in range(len(word), start, -1):
        piece = ("##" if start else "") + word[start:end]
        if piece in tokens:
          pieces.append(piece)
          start = end
          break
      else:
        return ["[UNK]"]
    return pieces

  assert cut("working") == ["working"]
  assert cut("thework") == ["the", "##work"]
  assert "".join(cut("netwhork")).replace("##", "") == "netwhork"
  assert cut("jazz") == ["[UNK]"]


def test_all_of_it_is_public(saved):
  told = dataclasses.asdict(private_vocabulary.read_release(saved))
  assert not {"seed", "units", "documents", "counts"} & told.keys()
