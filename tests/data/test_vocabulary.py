"""Vocabularies: exact, deterministic, special tokens in place."""

import io
import re

import pytest
import sentencepiece

from dptrain.data import special_tokens
from dptrain.data.vocabulary import Vocabulary
from dptrain.data.vocabulary import VocabularySettings
from dptrain.data.vocabulary import load_vocabulary
from dptrain.data.vocabulary import train_vocabulary


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_twice_gives_equal_bytes(documents, tmp_path, model_type):
  settings = VocabularySettings(size=120, model_type=model_type)
  texts = [each.text for each in documents]
  first = train_vocabulary(texts, settings, tmp_path / "a" / "first.model")
  second = train_vocabulary(iter(texts), settings, tmp_path / "second.model")
  assert first.size == second.size == 120
  assert first.fingerprint == second.fingerprint
  assert (tmp_path / "a" / "first.model").read_bytes() == (
    tmp_path / "second.model"
  ).read_bytes()


def test_sampling_lines_is_deterministic_and_reaches_the_end(tmp_path):
  lines = [f"early words {i}" for i in range(300)]
  lines += [f"final lines {i}" for i in range(300)]
  settings = VocabularySettings(size=40, max_lines=100)
  first = train_vocabulary(lines, settings, tmp_path / "first.model")
  second = train_vocabulary(lines, settings, tmp_path / "second.model")
  assert first.fingerprint == second.fingerprint
  assert special_tokens.UNK_ID not in first.encode(["final"])[0]


def test_training_is_quiet_and_leaves_one_file(documents, tmp_path, capfd):
  texts = [each.text for each in documents]
  train_vocabulary(texts, VocabularySettings(size=120), tmp_path / "v.model")
  assert capfd.readouterr() == ("", "")
  assert [each.name for each in tmp_path.iterdir()] == ["v.model"]


def test_special_tokens_are_where_the_constants_say(vocabulary):
  names = ["PAD", "UNK", "CLS", "SEP", "MASK"]
  ids = [getattr(special_tokens, f"{name}_ID") for name in names]
  assert ids == [0, 1, 2, 3, 4]
  assert [vocabulary.piece(i) for i in ids] == [f"[{name}]" for name in names]


def test_text_that_spells_special_tokens_stays_text(vocabulary):
  (ids,) = vocabulary.encode(["[PAD] [CLS] ba [SEP] [MASK] \0"])
  assert set(ids) & {0, 2, 3, 4} == set()


def test_round_trip(vocabulary, documents):
  texts = [each.text for each in documents]
  assert [vocabulary.decode(ids) for ids in vocabulary.encode(texts)] == texts
  assert vocabulary.encode(["", "  "]) == [[], []]


def test_saved_vocabulary_loads(vocabulary, tmp_path):
  vocabulary.save(tmp_path / "deep" / "v.model")
  loaded = load_vocabulary(tmp_path / "deep" / "v.model")
  assert loaded.fingerprint == vocabulary.fingerprint
  assert loaded.encode(["bakeli"]) == vocabulary.encode(["bakeli"])


def test_lines_beyond_sentencepieces_limit_are_not_skipped(tmp_path):
  # One line of 60 kB: SentencePiece itself would find no text at all.
  text = " ".join(["alpha beta gamma"] * 4000)
  assert (
    train_vocabulary(
      [text], VocabularySettings(size=24), tmp_path / "v.model"
    ).size
    == 24
  )


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_small_a_corpus_names_the_largest_size(tmp_path, model_type):
  texts = ["a small text", "another small text, with few words"]
  settings = VocabularySettings(model_type=model_type)
  with pytest.raises(ValueError, match=r"size=8192 is too large.*is \d+") as no:
    train_vocabulary(texts, settings, tmp_path / "v.model")
  assert not list(tmp_path.iterdir())
  largest = int(re.search(r"size is (\d+)", str(no.value))[1])
  settings = VocabularySettings(size=largest, model_type=model_type)
  trained = train_vocabulary(texts, settings, tmp_path / "v.model")
  assert trained.size == largest


def test_too_small_a_size_names_what_the_characters_need(tmp_path):
  with pytest.raises(ValueError, match=r"size=10 is too small.*need \d\d"):
    train_vocabulary(
      ["the quick brown fox jumps over the lazy dog"],
      VocabularySettings(size=10),
      tmp_path / "v.model",
    )


@pytest.mark.parametrize("texts", [[], ["", " \n\t "]])
def test_empty_corpus(texts, tmp_path):
  with pytest.raises(ValueError, match="corpus holds no text"):
    train_vocabulary(texts, VocabularySettings(), tmp_path / "v.model")


def test_foreign_models_are_refused(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["alpha beta gamma delta"] * 9),
    model_writer=model,
    vocab_size=16,
    minloglevel=3,
  )
  path = tmp_path / "foreign.model"
  path.write_bytes(model.getvalue())
  with pytest.raises(ValueError, match=r"foreign\.model begins .*<unk> <s>"):
    load_vocabulary(path)
  for junk in (b"", b"junk"):
    path.write_bytes(junk)
    with pytest.raises(ValueError, match=r"foreign\.model"):
      load_vocabulary(path)
  with pytest.raises(FileNotFoundError):
    load_vocabulary(tmp_path / "absent.model")


def test_mask_must_be_a_control_token():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["alpha beta gamma delta"] * 9),
    model_writer=model,
    vocab_size=18,
    minloglevel=3,
    pad_id=0,
    unk_id=1,
    bos_id=2,
    eos_id=3,
    pad_piece="[PAD]",
    unk_piece="[UNK]",
    bos_piece="[CLS]",
    eos_piece="[SEP]",
    user_defined_symbols=["[MASK]"],
  )
  with pytest.raises(ValueError, match="as control tokens"):
    Vocabulary(model.getvalue())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"size": 5}, "size=5 must exceed"),
    ({"model_type": "word"}, "model_type='word' must be one of"),
    ({"character_coverage": 0.5}, r"character_coverage=0\.5"),
    ({"max_lines": 0}, "max_lines=0"),
  ],
)
def test_settings_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=message):
    VocabularySettings(**arguments)
