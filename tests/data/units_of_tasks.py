"""From gin files to examples by unit: what ends the tests of every format."""

import json
import random

from dptrain import cli
from dptrain import configuration
from dptrain.data import prepared
from dptrain.privacy import keys
from dptrain.training import examples

SIZES = (
  "--gin.VOCABULARY_SIZE=60",
  "--gin.SEQUENCE_LENGTH=16",
  "--gin.VocabularySettings.character_coverage=1.0",
)


def words(seed, count):
  """So many made-up words of few letters."""
  draws = random.Random(seed)
  syllables = ["ba", "ke", "li", "mo", "nu", "ra", "si", "to"]
  return " ".join("".join(draws.choices(syllables, k=2)) for _ in range(count))


def prepare(folder, gin_file, flags):
  """Runs `dptrain prepare`; returns the manifest's counts of units."""
  assert (
    cli.main(
      [
        "prepare",
        f"--gin_file={gin_file}",
        f"--output={folder}",
        "--processes=1",
        *SIZES,
        *flags,
      ]
    )
    == 0
  )
  manifest = json.loads((folder / "manifest.json").read_text())
  return {name: each["units"] for name, each in manifest["splits"].items()}


def num_examples(folder, gin_file, flags):
  """How many units the run that the same flags describe would sample."""
  run = configuration.training_run(
    [gin_file],
    [
      each.removeprefix("--gin.").replace("=", " = ", 1)
      for each in ("--gin.MODEL_DIR=not used", *SIZES, *flags)
    ],
  )
  train, validation = (
    prepared.PreparedStore(folder, split) for split in ("train", "validation")
  )
  seed = keys.SecretSeed(bytes(32))
  return examples.of_run(run, train, validation, seed).num_examples
