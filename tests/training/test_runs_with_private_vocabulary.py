"""A private vocabulary in a run: from its papers to ledger, report, budget."""

import dataclasses
import random

import pytest
import small_run

from dptrain.data import corpus
from dptrain.data import private_vocabulary
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.privacy import accounting
from dptrain.privacy import keys
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import word_counts
from dptrain.privacy.accounting import Releases
from dptrain.reports import report as report_lib
from dptrain.training import loop
from dptrain.training import records as records_lib

SIZE = 300
NOISE, FAILURE_PROB, DELTA = 6.0, 4e-6, 1e-5
# A record is a part of a document: sqrt(2) sensitivities.
PRICED = Releases(1, 1.0, NOISE / 2**0.5)


def documents(seed, number=20):
  draw = random.Random(seed)
  words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(8)]
  return [
    corpus.Document(f"{seed}{i}", " ".join(draw.choices(words, k=60)))
    for i in range(number)
  ]


@pytest.fixture(autouse=True)
def _task(monkeypatch):
  found = {"train": documents("t"), "validation": documents("t", 3)}
  monkeypatch.setattr(corpus, "read_documents", lambda _, split: found[split])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """A vocabulary's file, with its papers, under a secret seed."""
  return make(tmp_path_factory.mktemp("vocabulary") / "v.model")


def make(path, seed=None, **told_of):
  seed = seed or keys.SecretSeed(b"s" * 32)
  release = word_counts.WordRelease(
    words_per_unit=8, noise_multiplier=NOISE, failure_prob=FAILURE_PROB
  )
  counts = {
    f" {a}{b}{c}{d}": 500
    for a in "abc"
    for b in "def"
    for c in "gh"
    for d in "ab"
  }
  noisy, told = private_vocabulary.release_words(
    counts, release, unit="document", seed=seed, **told_of
  )
  settings = vocabulary_lib.VocabularySettings(
    size=SIZE, model_type="bpe", character_coverage=1.0
  )
  vocabulary = vocabulary_lib.train_on_word_counts(noisy, settings)
  private_vocabulary.save(vocabulary, told, path)
  return path


def run_of(directory, given, **options):
  return small_run.make_run(
    directory,
    vocabulary=vocabulary_lib.VocabularySettings(path=str(given)),
    vocab_size=SIZE,
    delta=DELTA,
    **options,
  )


def squeezed(text):
  return " ".join(text.split())


def test_it_is_priced_in_ledger_and_report(given, tmp_path):
  result = loop.train(run_of(tmp_path, given, fixed_seed=None))
  ledger = ledger_lib.read(tmp_path)
  (line,) = small_run.ledger_lines(tmp_path, "other")
  assert line["noise_multiplier"] == pytest.approx(NOISE / 2**0.5)
  assert line["failure_prob"] == FAILURE_PROB
  assert not any("vocabulary" in text for text in ledger.unprotected[1:])
  assert "Where records begin and end" in ledger.unprotected[0]
  updates = ledger.update_releases()
  assert PRICED in ledger.releases()
  expected = accounting.epsilon([PRICED, *updates], DELTA - FAILURE_PROB)
  report = report_lib.make_report(ledger)
  assert report.epsilon.value == result.epsilon == expected.value
  assert report.delta == DELTA
  assert report.num_rounds == report.num_releases == 6
  assert sum(row["count"] for row in report.schedule) == 6
  text = squeezed(report.as_text())
  assert "the vocabulary was learned privately (noise multiplier 6, 8" in text
  assert "its price is part of epsilon" in text
  assert "the vocabulary, and every checkpoint" in text
  assert "learned from the training text without noise" not in text


def test_going_on_adds_no_line(given, tmp_path):
  loop.train(run_of(tmp_path, given))
  before = small_run.ledger_bytes(tmp_path)
  loop.train(run_of(tmp_path, given))
  assert small_run.ledger_bytes(tmp_path) == before


def test_the_budget_holds_both(given, tmp_path):
  run = run_of(tmp_path, given, noise=None, target_epsilon=3.0)
  result = loop.train(run)
  assert result.step == 6
  assert 2.9 < result.epsilon <= 3.0
  told = report_lib.make_report(ledger_lib.read(tmp_path))
  updates = ledger_lib.read(tmp_path).update_releases()
  assert accounting.epsilon(updates, DELTA).value < 2.9
  assert told.epsilon.value == result.epsilon


def test_a_budget_that_it_has_spent(given, tmp_path):
  run = run_of(tmp_path, given, noise=None, target_epsilon=0.5)
  with pytest.raises(ValueError, match=r"target_epsilon=0\.5 is spent before"):
    loop.train(run)
  assert not small_run.ledger_lines(tmp_path)


def test_the_papers_stay_with_the_run(given, tmp_path):
  own = make(tmp_path / "own.model")
  directory = tmp_path / "run"
  directory.mkdir()
  run = run_of(directory, own)
  first = records_lib.read_records(run, directory, started=False)
  private_vocabulary.release_path(own).unlink()
  again = records_lib.read_records(run, directory, started=True)
  assert first.vocabulary_release == again.vocabulary_release is not None
  # A start that was refused leaves none for another vocabulary.
  other = records_lib.read_records(run, directory, started=False)
  assert other.vocabulary_release is None


def test_a_vocabulary_without_papers_is_unprotected(given, tmp_path):
  own = tmp_path / "own.model"
  own.write_bytes(given.read_bytes())
  loop.train(run_of(tmp_path, own))
  ledger = ledger_lib.read(tmp_path)
  assert ledger.others == ()
  assert any("The vocabulary was given" in text for text in ledger.unprotected)


@pytest.mark.parametrize("other", [("lines", "train"), (None, "all")])
def test_a_vocabulary_of_other_units_is_refused_or_told_of(tmp_path, other):
  task = other[0] or run_of(tmp_path, "unused").task
  own = make(tmp_path / "own.model", task=task, split=other[1])
  run = run_of(tmp_path / "run", own)
  with pytest.raises(
    ValueError, match=r"were counted by document of .*same_un"
  ):
    loop.train(run)
  assert not ledger_lib.Ledger(tmp_path / "run" / ledger_lib.LEDGER_FILE).header
  same = dataclasses.replace(run.vocabulary, same_units=True)
  loop.train(dataclasses.replace(run, vocabulary=same))
  ledger = ledger_lib.read(tmp_path / "run")
  assert ledger.others
  (told,) = [t for t in ledger.unprotected if "counted by document of" in t]
  assert repr(task) in told
  assert "is taken on trust" in told


def test_a_vocabulary_of_the_same_task_needs_no_declaration(tmp_path):
  task = run_of(tmp_path, "unused").task
  own = make(tmp_path / "own.model", task=task, split="train")
  loop.train(run_of(tmp_path / "run", own))
  told = ledger_lib.read(tmp_path / "run").unprotected
  assert not any("counted by" in text for text in told)


def test_a_vocabulary_of_a_known_seed_is_unprotected(tmp_path):
  own = make(tmp_path / "own.model", keys.fixed_seed(0))
  loop.train(run_of(tmp_path, own))
  ledger = ledger_lib.read(tmp_path)
  assert ledger.others == ()
  assert any("a seed that is known" in text for text in ledger.unprotected)
