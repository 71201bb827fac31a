"""Whole runs: reproducible, within budget, silent about private figures."""

import json

import numpy as np
import pytest
import small_run

from dptrain.privacy import accounting
from dptrain.training import progress as progress_lib

PRIVATE = (
  "realised_batch_size",
  "clip_fraction",
  "non_finite_examples",
  "gradient_snr",
)


@pytest.fixture
def curves(monkeypatch):
  """What a run would write to TensorBoard, as (step, name, value)."""
  points = []
  monkeypatch.setattr(
    progress_lib.Progress,
    "curves",
    lambda _, step, values: points.extend(
      (step, name, value) for name, value in values.items()
    ),
  )
  return points


def test_two_runs_are_bitwise_equal(finished, tmp_path):
  small_run.train(tmp_path)
  small_run.assert_same(finished, tmp_path)


def test_another_seed_gives_another_run(finished, tmp_path):
  small_run.train(tmp_path, fixed_seed=8)
  step, state = small_run.newest_state(finished)
  other_step, other = small_run.newest_state(tmp_path)
  assert step == other_step
  assert not np.array_equal(state["/params/mix"], other["/params/mix"])


def test_nothing_private_is_told_by_default(tmp_path, curves, capfd):
  result = small_run.train(tmp_path, log_period=1)
  assert {name for _, name, _ in curves} == {
    "epsilon",
    "validation/accuracy",
    "validation/loss",
  }
  # 3 updates that expect 20 examples and 3 that expect 40.
  assert result.expected_examples == 180
  told = "".join(capfd.readouterr()) + small_run.ledger_bytes(tmp_path).decode()
  told += (tmp_path / "privacy_report.txt").read_text()
  told += (tmp_path / "privacy_report.json").read_text()
  told += repr(result)
  for name in (*PRIVATE, "unprotected/", "clip fraction"):
    assert name not in told
  assert not (tmp_path / "tensorboard").exists()
  assert (
    result.epsilon
    == accounting.epsilon(
      [
        accounting.Releases(3, 0.1, 4.0),
        accounting.Releases(3, 0.2, 4.0),
      ],
      1e-5,
    ).value
  )


def test_private_figures_are_declared_when_they_are_told(tmp_path, curves):
  small_run.train(tmp_path, log_period=2, unprotected_training_metrics=True)
  names = {name for _, name, _ in curves}
  assert {f"unprotected/{name}" for name in PRIVATE} <= names
  assert {"unprotected/loss", "unprotected/accuracy"} <= names
  sizes = [
    value
    for _, name, value in curves
    if name == "unprotected/realised_batch_size"
  ]
  assert len(sizes) == 3
  assert sizes != [20, 40, 40]
  declared = [
    line["what"] for line in small_run.ledger_lines(tmp_path, "unprotected")
  ]
  assert any("realised batch size" in what for what in declared)
  assert "realised batch size" in (tmp_path / "privacy_report.txt").read_text()


def test_stops_at_the_last_update_that_fits(tmp_path, capfd):
  """With the noise given as well; and a finished run stays as it is."""

  def epsilon(steps):
    releases = [
      accounting.Releases(min(steps, 3), 0.1, 4.0),
      accounting.Releases(max(steps - 3, 0), 0.2, 4.0),
    ]
    return accounting.epsilon(releases, 1e-5).value

  target = (epsilon(4) + epsilon(5)) / 2
  result = small_run.train(tmp_path, target_epsilon=target)
  told = capfd.readouterr().err
  assert f"epsilon {target:g}, allows 4 of 6 updates" in told
  assert result.step == 4
  assert result.stopped == f"one more would exceed epsilon {target:g}"
  assert result.epsilon == epsilon(4) <= target
  assert result.expected_examples == 3 * 20 + 40
  assert len(small_run.ledger_lines(tmp_path, "release")) == 4
  assert json.loads((tmp_path / "privacy_report.json").read_text())["epsilon"][
    "value"
  ] == epsilon(4)
  before = small_run.ledger_bytes(tmp_path)

  again = small_run.train(tmp_path, target_epsilon=target)
  assert "all 4 updates are made: nothing left to do" in capfd.readouterr().err
  assert (again.step, again.stopped) == (4, result.stopped)
  assert again.epsilon == result.epsilon
  assert again.accuracy == result.accuracy
  assert small_run.ledger_bytes(tmp_path) == before


def test_a_budget_that_not_one_update_fits_into(tmp_path):
  result = small_run.train(tmp_path, target_epsilon=0.01)
  assert (result.step, result.expected_examples) == (0, 0)
  assert result.epsilon == 0
  assert not small_run.ledger_lines(tmp_path, "release")


def test_calibrated_noise_affords_the_whole_plan(tmp_path):
  result = small_run.train(tmp_path, noise=None, target_epsilon=0.5, period=0)
  assert (result.step, result.stopped) == (6, "")
  assert 0.49 < result.epsilon <= 0.5
  small_run.train(tmp_path, noise=None, target_epsilon=0.5, period=0)
  assert len(small_run.ledger_lines(tmp_path, "branch")) == 1


def test_a_finished_run_is_left_alone(copy, capfd):
  before = small_run.ledger_bytes(copy)
  result = small_run.train(copy)
  assert result.step == 6
  assert "nothing left to do" in capfd.readouterr().err
  assert small_run.ledger_bytes(copy) == before


def test_updates_without_any_example(tmp_path):
  """Nearly all draws are empty; training goes on, by noise alone."""
  result = small_run.train(
    tmp_path,
    sizes=(1, 1),
    steps=4,
    delta=1e-6,
    corpus={"num_examples": 100_000},
    period=0,
  )
  assert result.step == 4
  _, state = small_run.newest_state(tmp_path)
  assert all(np.isfinite(array).all() for array in state.values())


def test_two_processes_cannot_train_in_one_model_dir(tmp_path):
  from dptrain.privacy import ledger

  with (
    ledger.opened(tmp_path),
    pytest.raises(ledger.LedgerError, match="another process is training"),
  ):
    small_run.train(tmp_path)


def test_an_optimizer_says_what_it_leaves_alone(tmp_path, capsys):
  small_run.train(tmp_path, steps=2, optimizer="shampoo", rate=1e-3)
  told = capsys.readouterr().err
  assert told.count("Shampoo: ") == 1
  assert "tokens [50, 16]" in told
