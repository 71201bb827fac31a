"""`python -m t5x.train` and `t5x.eval` on the shipped gin files."""

import json
import os
import random
import subprocess
import sys

import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch
import small_run

from dptrain import configuration

GIN = configuration.gin_folder() / "t5x"
SETTINGS = {
  "VOCABULARY_SIZE": 60,
  "SEQUENCE_LENGTH": 16,
  "bert.Bert.width": 16,
  "bert.Bert.head_size": 8,
  "bert.Bert.num_layers": 1,
  "START_BATCH": 16,
  "FULL_BATCH": 32,
  "RAMP_STEPS": 3,
  "TOTAL_STEPS": 4,
  "WARMUP_STEPS": 1,
  "RAMP_SIZES": 3,
  "TARGET_EPSILON": None,
  "plan.PrivacySettings.noise_multiplier": 2.0,
  "DELTA": 1e-4,
  "CHECKPOINT_PERIOD": 2,
  "EVALUATION_PERIOD": 4,
}
TEXT_TASK = """
from __gin__ import dynamic_registration
from dptrain.tasks import text_files
text_files.register.files = "corpus/*.txt"
TASK = @text_files.register()
"""


def run(folder, program, *files, **macros):
  """Runs a program of t5x; returns what it printed."""
  flags = [f"--gin_file={path}" for path in files]
  flags += [
    f"--gin.{name}={value!r}" for name, value in (SETTINGS | macros).items()
  ]
  done = subprocess.run(
    [sys.executable, "-m", program, *flags],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    timeout=small_launch.TIMEOUT,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
  return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A working directory with a corpus, and a folder to trip gin over."""
  folder = tmp_path_factory.mktemp("anywhere")
  (folder / "models").mkdir()
  (folder / "corpus").mkdir()
  draw = random.Random(0)
  words = [
    "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(80)
  ]
  for index in range(8):
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(100)]
    (folder / "corpus" / f"{index}.txt").write_text("\n".join(lines))
  (folder / "text.gin").write_text(TEXT_TASK)
  files = GIN / "python_docs.gin", "text.gin", GIN / "pretrain.gin"
  run(folder, "t5x.train", *files, MODEL_DIR="out")
  return folder


def test_the_folder_of_gin_files_is_printed(tmp_path):
  told = subprocess.run(
    [sys.executable, "-m", "dptrain.t5x_bridge"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert told.stdout.strip() == str(GIN)


def test_train(folder):
  assert small_launch.newest_state(folder / "out")[0] == 4
  releases = small_run.ledger_lines(folder / "out", "release")
  probabilities = [line["sampling_prob"] for line in releases]
  assert len(releases) == 4
  assert probabilities[0] < probabilities[-1]
  secret = (folder / "out" / "secret_seed").read_text().strip()
  assert secret not in (folder / "out" / "config.gin").read_text()


def test_evaluate(folder):
  before = sorted(os.listdir(folder / "out"))
  files = GIN / "python_docs.gin", "text.gin", GIN / "eval.gin"
  run(folder, "t5x.eval", *files, MODEL_DIR="out", EVAL_OUTPUT_DIR="scores")
  path = folder / "scores/inference_eval/dptrain_validation-metrics.jsonl"
  scored = json.loads(path.read_text())
  events = folder / "out" / "training_eval" / "dptrain_validation"
  during = small_launch.told(events)
  assert scored["accuracy"] == pytest.approx(during["accuracy"], rel=1e-5)
  assert scored["loss"] == pytest.approx(during["loss"], rel=1e-5)
  assert sorted(os.listdir(folder / "out")) == before
