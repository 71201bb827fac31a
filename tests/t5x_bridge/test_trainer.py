"""How a launch stops, what it tells, and what it keeps to itself."""

import dataclasses
import json
import os
import shutil
import signal

import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch
import small_run
from t5x import trainer as t5x_trainer
from tensorboard.backend.event_processing import event_accumulator

from dptrain.clipping import private_metrics
from dptrain.privacy import accounting
from dptrain.reports import report as report_lib
from dptrain.t5x_bridge import launch as launch_lib


def budget(updates):
  """An epsilon that allows so many updates of the smallest batch."""
  release = accounting.Releases(updates, 20 / 200, 4.0)
  return accounting.epsilon([release], 1e-5).value * 1.001


def releases(directory):
  return [line["step"] for line in small_run.ledger_lines(directory, "release")]


def test_the_budget_stops_t5x_between_two_checkpoints(tmp_path):
  options = {"target_epsilon": budget(3)}
  small_launch.train(tmp_path, **options)
  assert small_launch.newest_state(tmp_path)[0] == 3
  assert releases(tmp_path) == [0, 1, 2]
  # Another start finds nothing left to do.
  small_launch.train(tmp_path, **options)
  assert small_launch.newest_state(tmp_path)[0] == 3
  assert releases(tmp_path) == [0, 1, 2]


def test_an_interrupt_saves_and_the_next_launch_goes_on(
  launched, tmp_path, monkeypatch
):
  record = launch_lib.Launch.record

  def interrupted(self, step):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return record(self, step)

  monkeypatch.setattr(launch_lib.Launch, "record", interrupted)
  with pytest.raises(t5x_trainer.PreemptionError, match="command resumes"):
    small_launch.train(tmp_path)
  monkeypatch.undo()
  assert small_launch.newest_state(tmp_path)[0] == 3
  small_launch.train(tmp_path)
  small_launch.assert_same(launched, tmp_path)


def test_a_checkpoint_that_was_cast_is_not_repeated_under_the_same_noise(
  tmp_path,
):
  for _ in range(2):
    run = small_launch.make_run(tmp_path)
    launch = launch_lib.Launch(run, small_launch.records())
    arguments = small_launch.arguments(launch, total_steps=4)
    arguments["checkpoint_cfg"].save.dtype = "bfloat16"
    try:
      small_launch.t5x_train.train(**arguments)
    finally:
      launch.close()
    shutil.rmtree(tmp_path / "checkpoint_4")
  # The second launch began at update 2, on arrays that nobody had before.
  assert releases(tmp_path) == [0, 1, 2, 3, 2, 3]
  assert len(small_run.ledger_lines(tmp_path, "branch")) == 2


def test_the_clip_norm_may_adapt(tmp_path):
  def train(directory, total_steps):
    run = small_launch.make_run(directory)
    private = dataclasses.replace(run.privacy, adaptive_quantile=0.5)
    run = dataclasses.replace(run, privacy=private)
    launch = launch_lib.Launch(run, small_launch.records())
    small_launch.t5x_train.train(
      **small_launch.arguments(launch, total_steps=total_steps)
    )

  train(tmp_path / "whole", 4)
  train(tmp_path / "parts", 2)
  train(tmp_path / "parts", 4)
  small_launch.assert_same(tmp_path / "whole", tmp_path / "parts")
  _, state = small_launch.newest_state(tmp_path / "whole")
  norm = state["/state/param_states/step_state/l2_clip_norm"]
  assert norm != pytest.approx(0.1)


def tags(directory):
  events = event_accumulator.EventAccumulator(str(directory / "train"))
  events.Reload()
  return set(events.Tags()["tensors"])


def test_what_is_told_is_public(launched, tmp_path):
  told = tags(launched)
  assert {"epsilon", "expected_batch_size"} <= told
  assert not any("unprotected" in name for name in told)
  small_launch.train(
    tmp_path, steps=2, sizes=[20, 20], unprotected_training_metrics=True
  )
  assert "unprotected/clip_fraction" in tags(tmp_path)


def test_private_metrics_are_told(tmp_path):
  run = small_launch.make_run(tmp_path, steps=2, sizes=[20, 20])
  private = dataclasses.replace(run.privacy, private_metrics_share=0.1)
  launch = launch_lib.Launch(
    dataclasses.replace(run, privacy=private), small_launch.records()
  )
  small_launch.t5x_train.train(**small_launch.arguments(launch, total_steps=2))
  told = tags(tmp_path)
  for name in private_metrics.NAMES:
    assert {f"private/{name}", f"private_noise/{name}"} <= told
  assert not any("unprotected" in name for name in told)


def test_the_secret_stays_in_its_file(tmp_path):
  small_launch.train(tmp_path, fixed_seed=None, steps=2, sizes=[20, 20])
  secret = (tmp_path / "secret_seed").read_text().strip()
  forms = secret.encode(), bytes.fromhex(secret)
  holders = [
    path.name
    for path in tmp_path.rglob("*")
    if path.is_file() and any(form in path.read_bytes() for form in forms)
  ]
  assert holders == ["secret_seed"]
  assert (tmp_path / "config.gin").exists()


def test_the_report_is_written_with_the_checkpoints(launched):
  told = json.loads((launched / report_lib.JSON_FILE).read_text())
  assert told["num_releases"] == 6
