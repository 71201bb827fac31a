"""Corpora that cannot serve, as a user meets them: one line, nothing spent.

The same refusals below the command line: tests/data, tests/training.
"""

import random
import shutil

import pytest

from dptrain import cli
import gin

SIZE = ("--gin.VOCABULARY_SIZE=60", "--gin.SEQUENCE_LENGTH=16")


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


def write(folder):
  folder.mkdir(exist_ok=True)
  draw = random.Random(2)
  for number in range(6):
    words = ("".join(draw.choices("abcdefgh", k=5)) for _ in range(300))
    (folder / f"{number}-{'AB'[number % 2]}.txt").write_text(" ".join(words))
  return folder


@pytest.fixture
def text(tmp_path):
  """Six files by two users, and no more."""
  return write(tmp_path / "text")


def command(name, text, *flags):
  glob = str(text / "*") if text.is_dir() else str(text)
  files = f"--gin.TEXT_FILES={glob!r}"
  return [name, "--gin_file=text_files.gin", files, *SIZE, *flags]


def of(name, text, folder, *flags):
  """`train`, `prepare` or `vocab` with what it needs."""
  own = {
    "train": [f"--gin.MODEL_DIR={folder / 'model'}"],
    "prepare": [f"--output={folder / 'store'}", "--processes=1"],
    "vocab": [
      f"--output={folder / 'v.model'}",
      "--epsilon=9",
      "--delta=1e-6",
    ],
  }
  return command(name, text, *own[name], *flags)


def error_of(capsys, argv):
  capsys.readouterr()
  assert cli.main(argv) == 2
  (line,) = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith("dptrain: error: ")
  ]
  return line


def nothing_was_spent(folder):
  ledger = folder / "model" / "privacy_ledger.jsonl"
  return not list(folder.glob("v.model*")) and (
    not ledger.exists() or not ledger.read_bytes()
  )


@pytest.mark.parametrize("name", ["train", "prepare", "vocab"])
@pytest.mark.parametrize(
  ("data", "told"),
  [
    (b"", "hold no text"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not UTF-8: byte 0x89 at offset 0"),
    (b"\x7fELF\2\1\1\0\0\0", "is binary: it holds a NUL byte near offset 0"),
    (b"caf\xe9 au lait", "is not UTF-8: byte 0xe9 at offset 3"),
  ],
  ids=["empty", "image", "program", "latin-1"],
)
def test_files_that_hold_no_text(tmp_path, capsys, name, data, told):
  bad = tmp_path / "bad.txt"
  bad.write_bytes(data)
  line = error_of(capsys, of(name, bad, tmp_path))
  assert told in line
  assert str(bad) in line
  assert ("ENCODING_ERRORS=replace" in line) == bool(data)
  assert nothing_was_spent(tmp_path)
  assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["train", "prepare", "vocab"])
def test_users_whom_nothing_tells(text, tmp_path, capsys, name):
  flags = ["--gin_file=units/user.gin"]
  line = error_of(capsys, of(name, text, tmp_path, *flags))
  assert "split_by='user' needs unit" in line
  assert "--gin.USER_IN_PATH" in line
  flags.append("--gin.USER_IN_PATH='by-([A-Z])'")
  line = error_of(capsys, of(name, text, tmp_path, *flags))
  assert "finds no user in the path '0-A.txt'" in line
  assert nothing_was_spent(tmp_path)


def test_a_vocabulary_by_users_whom_nothing_tells(text, tmp_path, capsys):
  line = error_of(capsys, of("vocab", text, tmp_path, "--unit=user"))
  assert "has no user: --unit=user needs the feature 'unit'" in line
  assert nothing_was_spent(tmp_path)


def test_a_vocabulary_of_a_smaller_unit(text, tmp_path, capsys):
  flags = ["--size=290", "--epsilon=99", "--model_type=bpe"]
  for number in range(40):
    (text / f"more{number}-C.txt").write_text("alpha beta gamma " * 9)
  assert cli.main(of("vocab", text, tmp_path, *flags)) == 0
  own = "--gin.USER_IN_PATH='-([A-Z])'"
  more = ["--gin_file=units/user.gin", own, "--gin.VOCABULARY_SIZE=290"]
  more.append(f"--gin.VocabularySettings.path={tmp_path / 'v.model'}")
  more += ["--gin.TrainingRun.validation_split=None", "--gin.FULL_BATCH=2"]
  more += ["--gin.START_BATCH=1", "--gin.PHYSICAL_BATCH_SIZE=1"]
  line = error_of(capsys, of("train", text, tmp_path, *more))
  assert "one document as its unit, which does not protect a user" in line
  assert not (tmp_path / "model" / "checkpoints").exists()


# --- prepared stores ----------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder with a text and its store, made once; to be copied."""
  folder = tmp_path_factory.mktemp("made")
  text = write(folder / "text")
  assert cli.main(of("prepare", text, folder, "--shard_chars=2000")) == 0
  return folder


@pytest.fixture
def store(made, tmp_path):
  """A copy of the store, and the command that trains from it."""
  shutil.copytree(made / "store", tmp_path / "store")
  prepared = f"--gin.TrainingRun.prepared={tmp_path / 'store'}"
  return tmp_path / "store", of("train", made / "text", tmp_path, prepared)


def test_records_of_another_length(store, tmp_path, capsys):
  _, train = store
  line = error_of(capsys, [*train, "--gin.SEQUENCE_LENGTH=12"])
  assert "holds records of 16 tokens, but sequence_length=12" in line
  line = error_of(capsys, [*train, "--gin.bert.Bert.max_length=12"])
  assert "sequence_length=16 exceeds the model's max_length=12" in line
  assert nothing_was_spent(tmp_path)


def test_a_store_of_another_vocabulary(store, made, tmp_path, capsys):
  folder, train = store
  given = tmp_path / "other" / "store"
  flags = ["--gin.vocabulary.VocabularySettings.model_type=bpe"]
  other = of("prepare", made / "text", given.parent, *flags)
  assert cli.main(other) == 0
  path = f"--gin.VocabularySettings.path={given / 'vocabulary.model'}"
  line = error_of(capsys, [*train, path])
  assert "was prepared with another vocabulary than" in line
  line = error_of(capsys, [*train, "--gin.VOCABULARY_SIZE=61"])
  assert "size=61" in line
  assert "60 tokens" in line
  (folder / "vocabulary.model").write_bytes(
    (given / "vocabulary.model").read_bytes()
  )
  line = error_of(capsys, train)
  assert "is not the vocabulary that the records of" in line
  assert nothing_was_spent(tmp_path)


def test_a_flipped_byte_or_a_missing_shard(store, tmp_path, capsys):
  folder, train = store
  path = folder / "train-000001.tokens.npy"
  whole = path.read_bytes()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  line = error_of(capsys, train)
  assert f"{path} does not hold what was prepared" in line
  path.write_bytes(whole[:-1])
  assert f"{path} has " in error_of(capsys, train)
  path.unlink()
  line = error_of(capsys, train)
  assert f"{path} is missing" in line
  assert "prepare the corpus again" in line
  assert nothing_was_spent(tmp_path)
  assert not (tmp_path / "model" / "checkpoints").exists()


def test_a_store_that_does_not_tell_its_users(store, tmp_path, capsys):
  _, train = store
  flags = ["--gin_file=units/user.gin", "--gin.SPLIT_BY=record"]
  line = error_of(capsys, [*train, *flags])
  assert "unit='user', but the corpus does not tell to which user" in line
  assert nothing_was_spent(tmp_path)


def test_a_folder_that_is_no_store(store, tmp_path, capsys):
  folder, train = store
  (folder / "manifest.json").unlink()
  line = error_of(capsys, train)
  assert f"{folder} holds no prepared corpus" in line
  assert nothing_was_spent(tmp_path)
