"""The command line: reports, one-line errors, and one whole run from text."""

import json
import pathlib
import random
import re
import textwrap
import warnings

import pytest

from dptrain import cli
from dptrain import configuration
from dptrain.privacy import keys
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan
from dptrain.privacy import schedule
from dptrain.training import loop
from dptrain.training import progress
from dptrain.training import records
import gin

GIN = """
from __gin__ import dynamic_registration
from dptrain.data import vocabulary
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.optimizers import adamw
from dptrain.privacy import plan
from dptrain.privacy import schedule
from dptrain.tasks import text_files
from dptrain.training import run

bert.Bert.vocab_size = 50
bert.Bert.num_layers = 1
bert.Bert.width = 8
bert.Bert.num_heads = 2
bert.Bert.max_length = 16
masked_lm.MaskedLanguageModel.bert = @bert.Bert()
adamw.adamw.learning_rate = 1e-3
vocabulary.VocabularySettings.size = 50
text_files.register.files = %FILES
text_files.register.passage_chars = 200
text_files.register.encoding_errors = %ENCODING_ERRORS
ENCODING_ERRORS = 'strict'
schedule.constant.size = %SIZE
schedule.constant.num_steps = 2
plan.PrivacySettings.schedule = @schedule.constant()
plan.PrivacySettings.noise_multiplier = 4.0
plan.PrivacySettings.delta = 1e-6
run.TrainingRun.model_dir = %MODEL_DIR
run.TrainingRun.task = @text_files.register()
run.TrainingRun.model = @masked_lm.MaskedLanguageModel()
run.TrainingRun.privacy = @plan.PrivacySettings()
run.TrainingRun.optimizer = @adamw.adamw()
run.TrainingRun.sequence_length = 16
run.TrainingRun.physical_batch_size = 8
run.TrainingRun.vocabulary = @vocabulary.VocabularySettings()
SIZE = 16
"""


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


@pytest.fixture
def folder(tmp_path):
  """A folder with `run.gin` and three text files under `text/`."""
  (tmp_path / "run.gin").write_text(GIN)
  (tmp_path / "text").mkdir()
  draw = random.Random(0)
  for number in range(3):
    words = (
      "".join(draw.choices("abcdefgh", k=draw.randrange(2, 9)))
      for _ in range(500)
    )
    text = textwrap.fill(" ".join(words), 60)
    (tmp_path / "text" / f"{number}.txt").write_text(text)
  return tmp_path


def arguments(folder, *more, files="*.txt"):
  return [
    "train",
    f"--gin_file={folder / 'run.gin'}",
    f"--gin.FILES={folder / 'text' / files}",
    f"--gin.MODEL_DIR={folder / 'model'}",
    *more,
  ]


def error_of(capsys, argv):
  """The one line that a refused command writes."""
  assert cli.main(argv) == 2
  told = capsys.readouterr()
  assert told.out == ""
  (line,) = told.err.splitlines()
  assert line.startswith("dptrain: error: ")
  return line.removeprefix("dptrain: error: ")


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--gin.foo.Bar.x=1"], "foo.Bar"),
    (["--gin.SIZE=%NOPE"], "%NOPE has no value"),
    (["--gin.SIZZE=1"], "unused gin bindings: SIZZE"),
    (["--gin_bindings=SIZZE = 1"], "unused gin bindings: SIZZE"),
    (["--gin_file=nope.gin"], "--gin_file=nope.gin is in none of"),
    (["--gin.FILES=/nowhere/*.txt"], "no file matches '/nowhere/*.txt'"),
    (["--gin.SIZE=0"], "Phase.start_size=0 must be a whole number >= 1"),
    (["--gin.SIZE=["], "does not parse"),
    (["--gin.MODEL_DIR=''"], "TrainingRun.model_dir is empty"),
    (
      ["--gin.bert.Bert.max_length=8"],
      "sequence_length=16 exceeds the model's max_length=8",
    ),
  ],
)
def test_mistakes_have_one_line(folder, capsys, more, message):
  assert message in error_of(capsys, arguments(folder, *more))
  assert not (folder / "model").exists()


def test_no_gin_file(capsys):
  assert "--gin_file is missing" in error_of(capsys, ["train"])


def test_text_that_is_empty(folder, capsys):
  (folder / "text" / "none.txt").write_text(" \n")
  argv = arguments(folder, files="none.txt")
  assert "hold no text" in error_of(capsys, argv)


def test_text_that_is_not_utf_8(folder, capsys):
  bad = folder / "text" / "1.txt"
  bad.write_bytes(b"first line\ncaf\xe9 au lait\n" + bad.read_bytes())
  message = error_of(capsys, arguments(folder))
  assert f"{bad} is not UTF-8: byte 0xe9 at offset 14" in message
  assert "encoding_errors='replace'" in message
  # As it says: the run is then built.
  run = configuration.training_run(
    [str(folder / "run.gin")],
    [
      f"FILES={folder}/text/*.txt",
      "MODEL_DIR=x",
      "ENCODING_ERRORS=replace",
    ],
  )
  assert run.task.startswith("dptrain_text_files_")


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["train", "--gin.X"], "--gin.X has no value; write --gin.X=VALUE"),
    ([], "COMMAND"),
    (["fly"], "fly"),
    (["report"], "MODEL_DIR"),
  ],
)
def test_usage_errors_exit_with_2(argv, message, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(argv)
  assert caught.value.code == 2
  assert message in capsys.readouterr().err


def test_debug_shows_the_traceback():
  with pytest.raises(ValueError, match="--gin_file is missing"):
    cli.main(["--debug", "train"])


# --- reports ------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path):
  """A ledger of 3 updates under a secret seed."""
  made = plan.make_plan(
    plan.PrivacySettings(
      schedule=schedule.constant(100, 5), delta=1e-6, noise_multiplier=2.0
    ),
    num_examples=1000,
  )
  seed = keys.load_or_create(tmp_path)
  with ledger_lib.opened(tmp_path) as ledger:
    ledger.start(
      made, corpus="c", seed=seed.digest("identity").hex(), fixed_seed=False
    )
    branch = ledger.open_branch(
      checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
    )
    for step in range(3):
      ledger.record(branch.name, step, made.release(step))
  return tmp_path


def test_report_as_text(model_dir, capsys):
  assert cli.main(["report", str(model_dir)]) == 0
  told = capsys.readouterr().out
  assert told.startswith("Privacy report\n")
  assert "3 updates in all" in told
  assert "1e-06)-differentially" in told.replace("\n", " ")
  assert max(map(len, told.splitlines())) <= 80


def test_report_as_json(model_dir, capsys):
  assert cli.main(["report", str(model_dir), "--format=json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["num_releases"] == 3
  assert told["claim"] is True
  assert told["epsilon"]["value"] > 0
  assert told["plan"]["num_examples"] == 1000


def test_report_on_other_folders(tmp_path, capsys):
  message = error_of(capsys, ["report", str(tmp_path)])
  assert f"{tmp_path} is not a MODEL_DIR of dptrain" in message
  message = error_of(capsys, ["report", str(tmp_path / "nowhere")])
  assert "is not a MODEL_DIR" in message
  (tmp_path / "privacy_ledger.jsonl").touch()
  message = error_of(capsys, ["report", str(tmp_path)])
  assert "nothing was released yet" in message


def test_report_on_a_damaged_ledger(model_dir, capsys):
  path = model_dir / "privacy_ledger.jsonl"
  path.write_bytes(path.read_bytes().replace(b"2.0", b"3.0"))
  message = error_of(capsys, ["report", str(model_dir)])
  assert "line 2 is damaged" in message


# --- a whole run --------------------------------------------------------------


def test_from_text_files_to_a_privacy_report(folder, capfd):
  """The only test here that needs TensorFlow."""
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    assert cli.main(arguments(folder)) == 0
  told = capfd.readouterr().out
  assert "updates                2" in told
  assert "examples seen          32 (expected" in told
  assert "NO PRIVACY CLAIM" not in told
  model: pathlib.Path = folder / "model"
  assert (model / "vocabulary.model").exists()
  assert (model / "secret_seed").stat().st_mode & 0o777 == 0o600
  assert list((model / "tensorboard").glob("events*"))
  curves = b"".join(p.read_bytes() for p in (model / "tensorboard").iterdir())
  assert b"epsilon" in curves
  assert b"validation/accuracy" in curves
  assert b"unprotected" not in curves
  written = (model / "privacy_report.txt").read_text()
  assert cli.main(["report", str(model)]) == 0
  assert written.startswith(capfd.readouterr().out)
  # Compared with itself, on its validation split, it has no churn.
  argv = [x for x in arguments(folder)[1:] if "MODEL_DIR" not in x]
  told_of = ["churn", str(model), str(model), "--format=json"]
  assert cli.main([*told_of, *argv]) == 0
  found = json.loads(capfd.readouterr().out)
  assert found["num_tokens"] > 0
  assert found["total_variation"] == 0
  # Nothing of the secret seed leaves its file.
  seed = (model / "secret_seed").read_text().strip()
  for path in (model / "privacy_ledger.jsonl", model / "privacy_report.json"):
    assert seed not in path.read_text()
  assert seed not in told


def vocab(folder, *flags):
  files = folder / "text" / "*.txt"
  return cli.main(
    [
      "vocab",
      "--gin_file=run.gin",
      f"--gin_search_paths={folder}",
      f"--gin.FILES={str(files)!r}",
      f"--output={folder / 'private.model'}",
      "--words_per_unit=8",
      *flags,
    ]
  )


def test_vocab_then_plan(folder, capsys):
  for number in range(300):
    (folder / "text" / f"more{number}.txt").write_text("abba dada gaga fad.")
  (folder / "text" / "rare.txt").write_text("abba xylophone")
  flags = ["--epsilon=8", "--delta=1e-7", "--model_type=bpe"]
  status = vocab(folder, *flags, "--size=262")
  told = capsys.readouterr()
  assert status == 2
  assert "size=262 is too small" in told.err
  assert "costs no more privacy" in told.err
  words = folder / "private.model.words.tsv"
  assert "xylophone" not in words.read_text()
  assert " abba\t" in words.read_text()

  flags = ["--size=280", "--model_type=bpe", "--vocab_txt"]
  again = [*flags, f"--words={words}", f"--output={folder / 'next.model'}"]
  assert vocab(folder, *again) == 0
  assert "280 tokens from 5 words" in capsys.readouterr().out
  large = [*again, "--size=900", f"--output={folder / 'large.model'}"]
  assert vocab(folder, *large) == 0
  assert re.search(r"900 .* 5 words, \d+ of them", capsys.readouterr().out)
  pieces = (folder / "next.model.vocab.txt").read_text().splitlines()
  assert pieces[:2] == ["[PAD]", "[UNK]"]
  assert vocab(folder, *again) == 2
  assert "none is overwritten" in capsys.readouterr().err.replace("\n", " ")
  assert vocab(folder, *again, "--epsilon=1", "--output=x") == 2
  assert "--epsilon and --words are both given" in capsys.readouterr().err

  path = str(folder / "next.model")
  plan_flags = [
    "plan",
    "--gin_file=run.gin",
    f"--gin_search_paths={folder}",
    f"--gin.FILES={str(folder / 'text' / '*.txt')!r}",
    "--num_examples=1000",
    "--format=json",
  ]
  assert cli.main(plan_flags) == 0
  without = json.loads(capsys.readouterr().out)
  given = f"--gin.vocabulary.VocabularySettings.path={path!r}"
  assert cli.main([*plan_flags, given]) == 0
  told = json.loads(capsys.readouterr().out)
  assert without["others"] == []
  assert told["others"][0]["failure_prob"] == 5e-8
  assert told["epsilon"]["value"] > without["epsilon"]["value"] + 5


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--epsilon=1"], "--delta is missing"),
    (["--delta=1e-6"], "give one of --epsilon and --noise_multiplier"),
    (["--delta=2", "--epsilon=1"], "delta=2.0 must lie"),
    (["--delta=1e-6", "--epsilon=1", "--unit=page"], "--unit=page must be"),
    (
      ["--delta=1e-6", "--noise_multiplier=1", "--words_per_unit=0"],
      "words_per_unit=0",
    ),
    (["--delta=1e-6", "--epsilon=0.01"], "no word is held by enough"),
  ],
)
def test_vocab_refuses(folder, capsys, flags, message):
  assert vocab(folder, *flags) == 2
  assert message in capsys.readouterr().err
  assert not list(folder.glob("private.model*"))


def test_prepares_once_and_trains_from_there(folder, capsys, monkeypatch):
  more = [f"--gin_file={folder / 'run.gin'}"]
  text = f"--gin.FILES={folder / 'text' / '*.txt'}"
  store = f"--output={folder / 'store'}"
  options = ["--processes=1", "--shard_chars=2000"]
  assert cli.main(["prepare", *more, text, store, *options]) == 0
  told = capsys.readouterr()
  assert "validation " in told.out
  assert "records of 16 tokens" in told.out
  manifest = (folder / "store" / "manifest.json").read_bytes()
  assert cli.main(["prepare", *more, text, store, *options]) == 0
  assert (folder / "store" / "manifest.json").read_bytes() == manifest
  assert not (folder / "not used").exists()
  assert cli.main(["prepare", *more, text, store]) == 2
  told = capsys.readouterr()
  assert "shard_chars=2000, but shard_chars=16000000" in told.err
  seen = []
  monkeypatch.setattr(loop, "train", seen.append)
  monkeypatch.setattr(progress, "summary", lambda *_, **__: "")
  model = f"--gin.MODEL_DIR={folder / 'model'}"
  prepared = f"--gin.TrainingRun.prepared={folder / 'store'}"
  assert cli.main(["train", *more, text, model, prepared]) == 0
  (run,) = seen
  (folder / "model").mkdir()
  found = records.read_records(run, folder / "model", started=False)
  train = json.loads(manifest)["splits"]["train"]
  assert found.train.num_examples == train["records"]
  assert len(train["shards"]) > 2
