"""Each line of bad input has its one clear error, before anything is spent.

What gin and the command line refuse is in tests/test_configuration.py; what
text files may not hold in tests/test_cli.py.
"""

import dataclasses

import pytest
import small_run

from dptrain import cli
from dptrain import configuration
from dptrain.models import masked_lm
from dptrain.models import ngrammer
from dptrain.models import sampled_softmax
from dptrain.training import records as records_lib


@pytest.fixture
def error_of(monkeypatch, capsys):
  """Runs `dptrain train` on settings; returns its one line of error."""

  def run(directory, corpus=None, **options):
    monkeypatch.setattr(
      configuration,
      "training_run",
      lambda *_: small_run.make_run(directory, **options),
    )
    monkeypatch.setattr(
      records_lib,
      "read_records",
      lambda *_, **__: small_run.records(**(corpus or {})),
    )
    assert cli.main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dptrain: error: ")
    return line.removeprefix("dptrain: error: ")

  return run


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"corpus": {"num_examples": 15}, "sizes": (8, 8)},
      "the corpus has 15 records, fewer than physical_batch_size=16",
    ),
    (
      {"sizes": (20, 201)},
      "expected_batch_size=201 from update 3 on exceeds the corpus of 200",
    ),
    (
      {"sizes": (300, 100)},
      "expected_batch_size=300 from update 0 on exceeds the corpus of 200",
    ),
    ({"l2_clip_norm": 0}, "PrivacySettings.l2_clip_norm=0 must be"),
    ({"l2_clip_norm": -1.0}, "PrivacySettings.l2_clip_norm=-1.0 must be"),
    ({"noise": 0}, "PrivacySettings.noise_multiplier=0 must be"),
    ({"noise": -0.5}, "PrivacySettings.noise_multiplier=-0.5 must be"),
    ({"noise": None}, "noise_multiplier and target_epsilon are both None"),
    (
      {"noise": None, "target_epsilon": 1e-7},
      "target_epsilon=1e-07 is reached by no noise multiplier",
    ),
    ({"delta": 0}, "delta=0 must lie strictly between 0 and 1"),
    ({"clipping": "median"}, "PrivacySettings.clipping='median'"),
    (
      {"max_length": 15},
      "sequence_length=16 exceeds the model's max_length=15",
    ),
    ({"physical_batch_size": 0}, "TrainingRun.physical_batch_size=0"),
    ({"physical_batch_size": 16.0}, "TrainingRun.physical_batch_size=16.0"),
    ({"log_period": 0}, "TrainingRun.log_period=0"),
    ({"tensorboard": "false"}, "TrainingRun.tensorboard='false'"),
    (
      {"unprotected_training_metrics": "no"},
      "TrainingRun.unprotected_training_metrics='no' must be True or False",
    ),
    ({"fixed_seed": "none"}, "TrainingRun.fixed_seed='none'"),
    ({"period": -1}, "CheckpointSettings.period=-1"),
  ],
  ids=str,
)
def test_refused_before_anything_is_spent(error_of, tmp_path, options, message):
  assert message in error_of(tmp_path, **options)
  ledger = tmp_path / "privacy_ledger.jsonl"
  assert not ledger.exists() or ledger.read_bytes() == b""
  assert not (tmp_path / "checkpoints").exists()


def test_an_empty_model_dir(error_of):
  assert "TrainingRun.model_dir is empty: set MODEL_DIR" in error_of("")


@pytest.mark.parametrize(
  ("options", "difference"),
  [
    ({"corpus": {"num_examples": 201}}, "num_examples was 200 and is now 201"),
    (
      {"corpus": {"seed": 5}},
      "the content of the training records is not the same",
    ),
    ({"l2_clip_norm": 0.2}, "l2_clip_norm was 0.1 and is now 0.2"),
    ({"noise": 4.5}, "noise_multiplier was 4.0 and is now 4.5"),
    ({"sizes": (20, 50)}, "schedule was "),
    ({"steps": 8}, "schedule was "),
    ({"clipping": "flat"}, "clipping was 'normalized' and is now 'flat'"),
    ({"delta": 1e-6}, "delta was 1e-05 and is now 1e-06"),
    ({"target_epsilon": 3.0}, "target_epsilon was None and is now 3.0"),
    ({"fixed_seed": 8}, "the secret seed is another one"),
    ({"fixed_seed": None}, "the secret seed is another one"),
  ],
  ids=str,
)
def test_the_model_dir_of_another_plan(error_of, copy, options, difference):
  before = small_run.ledger_bytes(copy)
  message = error_of(copy, **options)
  assert f"{copy} belongs to another plan: {difference}" in message
  assert "restore that setting, or start in a new MODEL_DIR" in message
  assert small_run.ledger_bytes(copy) == before


def test_several_differences_are_all_named(error_of, copy):
  message = error_of(copy, noise=5.0, l2_clip_norm=1.0, corpus={"seed": 5})
  for name in ("noise_multiplier was", "l2_clip_norm was", "training records"):
    assert name in message


def test_a_delta_that_allows_publishing_records_is_warned_of(tmp_path):
  with pytest.warns(UserWarning, match=r"delta=0\.005 is not below 1/N=0\.005"):
    small_run.train(tmp_path, delta=0.005, steps=2)


def test_a_damaged_ledger(error_of, copy):
  path = copy / "privacy_ledger.jsonl"
  path.write_bytes(path.read_bytes().replace(b"4.0", b"9.0", 1))
  assert "privacy_ledger.jsonl, line 2 is damaged" in error_of(copy)


def test_all_checkpoints_damaged(copy, monkeypatch, capsys):
  for step in (2, 4, 6):
    (copy / "checkpoints" / str(step) / "metadata" / "metadata").write_text("x")
  monkeypatch.setattr(
    configuration, "training_run", lambda *_: small_run.make_run(copy)
  )
  monkeypatch.setattr(
    records_lib, "read_records", lambda *_, **__: small_run.records()
  )
  assert cli.main(["train"]) == 2
  *told, last = capsys.readouterr().err.splitlines()
  assert len(told) == 3
  assert last.startswith("dptrain: error: none of the 3 checkpoints in ")


def test_classes_are_not_drawn_by_two_programs(tmp_path):
  model = masked_lm.MaskedLanguageModel(
    small_run.model(logit_scale=8.0).bert,
    sampling=sampled_softmax.SampledSoftmax(5),
  )
  run = dataclasses.replace(small_run.make_run(tmp_path), model=model)
  with pytest.raises(
    ValueError, match=r"clipping_method='two_pass' .*sampling"
  ):
    dataclasses.replace(run, clipping_method="two_pass")


def test_clusters_are_not_found_by_two_programs(tmp_path):
  model = small_run.model()
  size = model.bert.width // model.bert.num_heads
  layer = ngrammer.NGrammerSettings(
    num_clusters=4, table_size=16, ngram_dim=size, combine="add"
  )
  model = dataclasses.replace(model, bert=model.bert.clone(ngrammer=layer))
  run = dataclasses.replace(small_run.make_run(tmp_path), model=model)
  with pytest.raises(
    ValueError, match=r"clipping_method='two_pass' .*Bert\.ngrammer"
  ):
    dataclasses.replace(run, clipping_method="two_pass")
