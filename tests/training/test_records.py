"""Records: what is refused, and whose vocabulary counts. No TensorFlow."""

import random
import subprocess
import sys

import pytest
import small_run

from dptrain.data import corpus
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.training import records as records_lib


def text(seed, num_words=400):
  """Made-up words of few letters, so that a small vocabulary suffices."""
  draw = random.Random(seed)
  return " ".join(
    "".join(draw.choices("abcdefgh", k=draw.randrange(2, 9)))
    for _ in range(num_words)
  )


@pytest.fixture
def documents(monkeypatch):
  """Documents by split, which the task then holds."""
  found = {
    "train": [corpus.Document(f"d{i}", text(i)) for i in range(5)],
    "validation": [corpus.Document("v", text("v", 60))],
  }
  monkeypatch.setattr(corpus, "read_documents", lambda _, split: found[split])
  return found


def run_of(directory, size=small_run.VOCABULARY, path=None, **options):
  settings = vocabulary_lib.VocabularySettings(size=size, path=path)
  return small_run.make_run(directory, vocabulary=settings, **options)


def test_reads_both_splits_in_one_vocabulary(documents, tmp_path):
  found = records_lib.read_records(run_of(tmp_path), tmp_path, started=False)
  assert found.vocabulary_size == small_run.VOCABULARY
  assert found.train.sequence_length == small_run.LENGTH
  assert found.train.num_examples > found.validation.num_examples > 0
  kept = vocabulary_lib.load_vocabulary(tmp_path / "vocabulary.model")
  assert kept.fingerprint == found.vocabulary_fingerprint


def test_no_validation_split(documents, tmp_path):
  run = run_of(tmp_path, validation_split=None)
  assert records_lib.read_records(run, tmp_path, False).validation is None


def test_a_started_run_keeps_its_vocabulary(documents, tmp_path):
  run = run_of(tmp_path)
  first = records_lib.read_records(run, tmp_path, started=False)
  documents["train"] = [corpus.Document("x", text("other"))]
  again = records_lib.read_records(run, tmp_path, started=True)
  assert again.vocabulary_fingerprint == first.vocabulary_fingerprint


def test_a_refused_start_leaves_no_vocabulary_that_counts(documents, tmp_path):
  records_lib.read_records(run_of(tmp_path), tmp_path, started=False)
  documents["train"] = [corpus.Document("x", text("other"))]
  run = run_of(tmp_path)
  again = records_lib.read_records(run, tmp_path, started=False)
  fresh = tmp_path / "fresh"
  fresh.mkdir()
  expected = records_lib.read_records(run, fresh, started=False)
  assert again.vocabulary_fingerprint == expected.vocabulary_fingerprint


def test_another_size_in_a_started_run(documents, tmp_path):
  records_lib.read_records(run_of(tmp_path), tmp_path, started=False)
  vocabulary_lib.train_vocabulary(
    [text(1)],
    vocabulary_lib.VocabularySettings(size=45),
    tmp_path / "vocabulary.model",
  )
  with pytest.raises(
    ValueError, match=r"VocabularySettings.size=50, but .* of 45 tokens"
  ):
    records_lib.read_records(run_of(tmp_path), tmp_path, started=True)


def test_a_vocabulary_that_does_not_fit_the_model(documents, tmp_path):
  documents.clear()  # told without reading anything
  with pytest.raises(
    ValueError, match=r"vocab_size=60 but Bert\.vocab_size=50"
  ):
    records_lib.read_records(run_of(tmp_path, size=60), tmp_path, False)
  assert not (tmp_path / "vocabulary.model").exists()


def test_a_given_vocabulary(documents, tmp_path):
  given = tmp_path / "given.model"
  settings = vocabulary_lib.VocabularySettings(size=50)
  made = vocabulary_lib.train_vocabulary([text(1)], settings, given)
  run = run_of(tmp_path, path=str(given))
  found = records_lib.read_records(run, tmp_path, started=False)
  assert found.vocabulary_fingerprint == made.fingerprint
  other = tmp_path / "other.model"
  vocabulary_lib.train_vocabulary([text(2)], settings, other)
  with pytest.raises(ValueError, match=r"path=.*other\.model' is not the voc"):
    records_lib.read_records(
      run_of(tmp_path, path=str(other)), tmp_path, started=True
    )
  with pytest.raises(FileNotFoundError, match=r"missing\.model"):
    records_lib.read_records(
      run_of(tmp_path, path=str(tmp_path / "missing.model")), tmp_path, False
    )


def test_an_empty_corpus(documents, tmp_path):
  documents["train"] = []
  with pytest.raises(ValueError, match="the corpus holds no text"):
    records_lib.read_records(run_of(tmp_path), tmp_path, started=False)


def test_an_empty_validation_split(documents, tmp_path):
  documents["validation"] = []
  with pytest.raises(ValueError, match="the corpus is empty"):
    records_lib.read_records(run_of(tmp_path), tmp_path, started=False)


def test_given_records_must_fit_the_run(tmp_path):
  run = small_run.make_run(tmp_path)
  good = small_run.records()
  records_lib.check_records(run, good)
  for change, message in (
    ({"vocabulary_size": 60}, "vocab_size=60"),
    (
      {"train": small_run.store(length=12)},
      "length 12, but sequence_length=16",
    ),
    ({"validation": small_run.store(length=12)}, "length 12"),
  ):
    with pytest.raises(ValueError, match=message):
      records_lib.check_records(run, good._replace(**change))
  tokens = good.train.tokens.copy()
  tokens[3, 3] = 50
  bad = good._replace(train=type(good.train)(tokens))
  with pytest.raises(ValueError, match=r"hold token 50.* has 50 tokens"):
    records_lib.check_records(run, bad)


def test_none_of_this_needs_tensorflow():
  # Other tests of the same session may have imported it: ask a new program.
  code = (
    "import sys, dptrain.training.loop, dptrain.configuration;"
    "assert not {'tensorflow', 'seqio', 'clu'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
