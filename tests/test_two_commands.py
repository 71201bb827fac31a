"""From files to a private model with a private vocabulary, by two commands.

As README has them, on text that is made up: at each level the report names its
own unit, and its epsilon has the vocabulary's price in it.
"""

import json
import random
import warnings

import pytest

from dptrain import cli
from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
import gin

USERS, FILES = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"), 4
COMMON = ("the", "bank", "of", "and", "reads", "tea", "on", "seas")
# The smallest model, and few updates; everything else is the shipped files'.
SMALL = (
  "--gin.bert.Bert.num_layers=1",
  "--gin.bert.Bert.width=16",
  "--gin.bert.Bert.head_size=8",
  "--gin.SEQUENCE_LENGTH=16",
  "--gin.TOTAL_STEPS=3",
  "--gin.RAMP_STEPS=1",
  "--gin.WARMUP_STEPS=1",
  "--gin.START_BATCH=4",
  "--gin.FULL_BATCH=6",
  "--gin.PHYSICAL_BATCH_SIZE=4",
  "--gin.TrainingRun.clipping_method=vmap",
  "--gin.TrainingRun.validation_split=None",
  "--gin.TARGET_EPSILON=None",
  "--gin.PrivacySettings.noise_multiplier=1.0",
)
LEVELS = {
  "record": (
    (),
    "Protected is one record: one fixed-length token sequence of the corpus.",
  ),
  "document": (
    (
      "--gin_file=units/document.gin",
      "--gin.RECORDS_PER_UNIT=2",
      "--gin.DOCUMENT_START='= '",
    ),
    "Protected is one document (of which at most 2 records of fixed length take"
    " part, as one example).",
  ),
  "user": (
    (
      "--gin_file=units/user.gin",
      "--gin.RECORDS_PER_UNIT=2",
      "--gin.USER_IN_PATH='-([A-Za-z]+)'",
    ),
    "Protected is one user: everything of theirs in the corpus (of which at"
    " most 2 records of fixed length take part, as one example).",
  ),
}


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files of authors; each has two parts, and one is not UTF-8."""
  draw = random.Random(3)
  place = tmp_path_factory.mktemp("corpus")
  for number in range(FILES):
    for user in USERS:
      secret = f"{user.lower()}x{number}"
      parts = [
        f"= Part {part}\n"
        + " ".join([*draw.choices(COMMON, k=60), secret])
        + "\n"
        for part in range(2)
      ]
      (place / f"{number}-{user}.txt").write_text("".join(parts))
  with (place / "0-Ann.txt").open("ab") as file:
    file.write(b"caf\xe9\n")
  return place


@pytest.mark.parametrize("level", LEVELS)
def test_two_commands_at_each_level(folder, tmp_path, capsys, level):
  flags, protected = LEVELS[level]
  files = f"--gin.TEXT_FILES={str(folder / '*.txt')!r}"
  common = ["--gin_file=text_files.gin", *flags, files]
  common.append("--gin.ENCODING_ERRORS=replace")
  vocabulary, model = tmp_path / "private.model", tmp_path / "model"
  assert (
    cli.main(
      [
        "vocab",
        *common,
        f"--output={vocabulary}",
        "--epsilon=60",
        "--delta=1e-6",
        "--words_per_unit=8",
      ]
    )
    == 0
  )
  counted = "user" if level == "user" else "document"
  assert f"noisy count of {counted}s exceeds" in capsys.readouterr().out
  words = (tmp_path / "private.model.words.tsv").read_text()
  assert " the\t" in words
  # Nobody's own words are in it.
  assert not any(f"{user.lower()}x" in words for user in USERS)
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    assert (
      cli.main(
        [
          "train",
          *common,
          *SMALL,
          f"--gin.VocabularySettings.path={vocabulary}",
          f"--gin.MODEL_DIR={model}",
        ]
      )
      == 0
    )
  told = capsys.readouterr().out
  assert "updates                3" in told
  assert "NO PRIVACY CLAIM" not in told
  text = " ".join((model / "privacy_report.txt").read_text().split())
  assert protected in text
  assert "The trained parameters, the vocabulary, and every checkpoint" in text
  assert f"8 words per {counted}): its price is part of epsilon" in text
  assert "learned from the training text without noise" not in text
  # With the vocabulary's price, by the ledger; and not without it.
  ledger = ledger_lib.read(model)
  (other,) = ledger.others
  left = 1e-5 - other.failure_prob
  epsilon = accounting.epsilon(ledger.releases(), left).value
  updates = ledger.update_releases()
  assert accounting.epsilon(updates, 1e-5).value < epsilon / 2
  report = json.loads((model / "privacy_report.json").read_text())
  assert report["epsilon"]["value"] == epsilon
  assert ledger.header["plan"]["unit"] == level
  number = ledger.header["plan"]["num_examples"]
  if level == "user":
    assert number < len(USERS)
  elif level == "document":
    assert len(USERS) * FILES < number < 2 * len(USERS) * FILES
  else:
    assert number > 2 * len(USERS) * FILES
