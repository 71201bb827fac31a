"""A launch of t5x trains what the thin loop trains, whatever happens to it."""

import json
import os
import signal

import numpy as np
import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch
import small_run

from dptrain.t5x_bridge import launch as launch_lib
from dptrain.training import loop
from dptrain.training import processes


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
  """MODEL_DIR of the same run under the thin loop, and its result."""
  directory = tmp_path_factory.mktemp("thin")
  run = small_launch.make_run(directory)
  return directory, loop.train(run, small_launch.records())


def test_the_same_as_the_thin_loop(launched, thin):
  directory, result = thin
  step, state = small_launch.newest_state(launched)
  thin_step, thin_state = small_run.newest_state(directory)
  assert step == thin_step == 6
  assert (
    small_launch.params(state).keys() == small_run_params(thin_state).keys()
  )
  for name, array in small_run_params(thin_state).items():
    np.testing.assert_allclose(
      small_launch.params(state)[name], array, rtol=0, atol=1e-6, err_msg=name
    )
  assert small_run.ledger_bytes(launched) == small_run.ledger_bytes(directory)
  told = json.loads((launched / "privacy_report.json").read_text())
  assert told["epsilon"]["value"] == pytest.approx(result.epsilon, abs=1e-6)


def small_run_params(state):
  return {
    name.removeprefix("/params/"): array
    for name, array in state.items()
    if name.startswith("/params/")
  }


def test_a_second_launch_resumes_bitwise(launched, copy):
  small_launch.train(copy)
  small_launch.assert_same(launched, copy)


def test_killed_in_mid_run(launched, tmp_path):
  # Without a seed t5x switches all of jax to its "unsafe_rbg" generator and
  # draws another seed at each start: neither may decide anything.
  program = small_launch.start(tmp_path, random_seed=None)
  small_launch.wait_for(
    program, lambda: small_launch.num_releases(tmp_path) > 4
  )
  os.kill(program.pid, signal.SIGKILL)
  program.communicate()
  small_launch.train(tmp_path)
  small_launch.assert_same(launched, tmp_path)


def test_processes_of_a_launch_compare_what_decides_the_updates(
  tmp_path, monkeypatch
):
  # Another numpy would draw another sample, and records would count twice.
  told = {}

  def differs(what, parts):
    told.update(parts)
    if "lineage" in parts:
      raise ValueError(f"process 1 has other {what}")

  monkeypatch.setattr(processes, "check_equal", differs)
  run = small_launch.make_run(tmp_path)
  with pytest.raises(ValueError, match=r"process 1 has other .* code"):
    launch_lib.Launch(run, small_launch.records())
  assert len(told["lineage"]) == 64
  monkeypatch.undo()
  launch_lib.Launch(run, small_launch.records()).close()  # it was let go of
