"""Gin files and bindings in, a run out; mistakes named in one sentence."""

import subprocess
import sys
import textwrap

import pytest

from dptrain import configuration
from dptrain.training import run as run_lib
import gin

MODEL_DIR = "MODEL_DIR=runs/test"


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


def demo(*bindings):
  return configuration.training_run(["demo.gin"], [MODEL_DIR, *bindings])


def test_the_demo_builds():
  run = demo()
  assert isinstance(run, run_lib.TrainingRun)
  assert run.model_dir == "runs/test"
  assert run.task == "dptrain_python_docs"
  run.model.check(run.sequence_length, run.vocabulary.size)


@pytest.mark.parametrize(
  ("binding", "read", "expected"),
  [
    ("MODEL_DIR=/a/b c", lambda run: run.model_dir, "/a/b c"),
    ("MODEL_DIR='quoted'", lambda run: run.model_dir, "quoted"),
    ("MODEL_DIR=~/runs/a-1", lambda run: run.model_dir, "~/runs/a-1"),
    ("DELTA = 1e-7", lambda run: run.privacy.delta, 1e-7),
    ("TARGET_EPSILON=None", lambda run: run.privacy.target_epsilon, None),
    ("run.TrainingRun.tensorboard=False", lambda run: run.tensorboard, False),
    (
      "vocabulary.VocabularySettings.path=a/vocabulary.model",
      lambda run: run.vocabulary.path,
      "a/vocabulary.model",
    ),
    (
      "plan.PrivacySettings.clipping=flat",
      lambda run: run.privacy.clipping,
      "flat",
    ),
  ],
)
def test_bindings_win_and_words_need_no_quotes(binding, read, expected):
  also = ["plan.PrivacySettings.noise_multiplier = 1.0"]
  assert read(demo(binding, *also)) == expected


@pytest.mark.parametrize(
  ("bindings", "message"),
  [
    (["foo.Bar.x = 1"], "No configurable matching 'foo.Bar'"),
    (
      ["TrainingRun.nope = 1"],
      "'TrainingRun' doesn't have a parameter named 'nope'",
    ),
    (
      ["DELTA = %NOPE"],
      "the gin macro %NOPE has no value: give --gin.NOPE=VALUE",
    ),
    (["DELTTA = 1e-6"], "unused gin bindings: DELTTA."),
    (["DELTTA = 1e-6", "EPS=1"], "unused gin bindings: DELTTA, EPS."),
    (
      ["sgd/schedule.Phase.ramp = 'linear'"],
      "unused gin bindings: sgd/dptrain.privacy.schedule.Phase.ramp.",
    ),
    (["DELTA = ["], "does not parse"),
    (["DELTA"], "gin binding 'DELTA' has no value"),
    (["DELTA = abc"], "a setting of PrivacySettings is of the wrong type"),
    (["DELTA = 2"], "delta=2 must lie strictly between 0 and 1"),
    (
      ["LEARNING_RATE = -1"],
      "peak=-1 must be a finite number above 0 (in warmup_linear_decay)",
    ),
    (
      ["SEQUENCE_LENGTH = 600"],
      "sequence_length=600 exceeds the model's"
      " max_length=512; lower sequence_length or raise Bert.max_length",
    ),
    (["SEQUENCE_LENGTH = long"], "TrainingRun.sequence_length='long'"),
    (
      ["plan.PrivacySettings.l2_clip_norm = 0"],
      "PrivacySettings.l2_clip_norm=0",
    ),
    (
      ["plan.PrivacySettings.noise_multiplier = -1"],
      "PrivacySettings.noise_multiplier=-1",
    ),
    (
      ["run.TrainingRun.unprotected_training_metrics = false"],
      "TrainingRun.unprotected_training_metrics='false' must be True or False",
    ),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_named_in_one_sentence(bindings, message):
  with pytest.raises(ValueError) as caught:
    demo(*bindings)
  told = str(caught.value)
  assert message in told
  assert "\n" not in told
  assert "In call to" not in told
  assert len(told) < 300


def test_what_is_missing():
  with pytest.raises(ValueError, match="--gin_file is missing"):
    configuration.training_run([], [])
  with pytest.raises(ValueError, match="macro %MODEL_DIR has no value"):
    configuration.training_run(["demo.gin"], [])
  with pytest.raises(FileNotFoundError, match=r"--gin_file=no\.gin is in none"):
    configuration.training_run(["no.gin"], [MODEL_DIR])
  with pytest.raises(ValueError, match="TrainingRun lacks 'model_dir', 'task'"):
    configuration.training_run(
      ["optimizers/sgd.gin"],
      [
        "WEIGHT_DECAY=0",
        "LEARNING_RATE=1",
        "WARMUP_STEPS=1",
        "TOTAL_STEPS=2",
      ],
    )


def write(folder, name, text):
  (folder / name).write_text(textwrap.dedent(text))
  return str(folder / name)


def test_a_run_that_lacks_settings(tmp_path):
  path = write(
    tmp_path,
    "bare.gin",
    """
    from __gin__ import dynamic_registration
    from dptrain.training import run
    run.TrainingRun.model_dir = 'x'
    """,
  )
  with pytest.raises(ValueError, match=r"^TrainingRun lacks .*'task'.*--gin"):
    configuration.training_run([path], [])


def test_an_included_file_that_is_missing(tmp_path):
  path = write(tmp_path, "a.gin", "include 'models/bert_huge.gin'\n")
  with pytest.raises(ValueError, match=r"bert_huge\.gin"):
    configuration.training_run([path], [])


def test_a_module_that_is_missing(tmp_path):
  path = write(
    tmp_path,
    "a.gin",
    """
    from __gin__ import dynamic_registration
    from dptrain import nothing
    """,
  )
  with pytest.raises(ValueError, match="nothing"):
    configuration.training_run([path], [])


def test_search_paths_come_before_dptrains_own(tmp_path):
  own = (configuration.gin_folder() / "demo.gin").read_text()
  folder = tmp_path / "folder"
  folder.mkdir()
  write(folder, "demo.gin", "include 'mine.gin'\n")
  (folder / "mine.gin").write_text(
    own.replace("SEQUENCE_LENGTH = 32", "SEQUENCE_LENGTH = 48")
  )
  run = configuration.training_run(["demo.gin"], [MODEL_DIR], str(folder))
  assert run.sequence_length == 48
  assert demo().sequence_length != 48


def test_later_files_win(tmp_path):
  path = write(tmp_path, "longer.gin", "SEQUENCE_LENGTH = 64\n")
  run = configuration.training_run(["demo.gin", path], [MODEL_DIR])
  assert run.sequence_length == 64


def test_one_run_after_another():
  demo("SEQUENCE_LENGTH = 64")
  assert demo().sequence_length != 64


def test_building_a_run_does_not_import_tensorflow():
  code = """
import sys
from dptrain import configuration
configuration.training_run(["demo.gin"], ["MODEL_DIR=x"])
assert not {"tensorflow", "seqio", "clu"} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", code], check=True)
