"""Killed runs: resumed, they end as if nothing had happened.

Each test starts `small_run.py` as a program of its own and ends it at a moment
of its choice.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import small_run

OPTIONS = {"steps": 12, "period": 2, "sizes": [20, 40]}
TIMEOUT = 120


def start(directory, **options):
  return subprocess.Popen(
    [
      sys.executable,
      pathlib.Path(small_run.__file__),
      str(directory),
      json.dumps({**OPTIONS, **options}),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(program, condition):
  end = time.monotonic() + TIMEOUT
  while not condition():
    if program.poll() is not None or time.monotonic() > end:
      program.kill()
      raise AssertionError("".join(program.communicate()))
    time.sleep(0.0005)


def num_releases(directory):
  """Counts the releases written so far; the last line may be half there."""
  path = directory / "privacy_ledger.jsonl"
  return path.read_bytes().count(b'"release"') if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """MODEL_DIR of the run that was never disturbed."""
  directory = tmp_path_factory.mktemp("whole")
  small_run.train(directory, **OPTIONS)
  return directory


def kill_and_resume(whole, directory, condition):
  """Kills a program once `condition` holds; resumes it to the end."""
  program = start(directory)
  wait_for(program, condition)
  os.kill(program.pid, signal.SIGKILL)
  program.communicate()
  assert program.returncode == -signal.SIGKILL
  released = num_releases(directory)
  small_run.train(directory, **OPTIONS)
  small_run.assert_same(whole, directory)
  return released


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_a_random_update(whole, tmp_path, seed):
  draw = random.Random(seed)
  # Once early, once in the middle, once late.
  update = draw.randrange(4 * seed - 3, min(4 * seed + 1, 12))
  pause = draw.uniform(0, 0.02)

  def condition():
    if num_releases(tmp_path) >= update:
      time.sleep(pause)
      return True
    return False

  assert kill_and_resume(whole, tmp_path, condition) >= update


def test_killed_during_a_save(whole, tmp_path):
  folder = tmp_path / "checkpoints"

  def saving():
    return num_releases(tmp_path) > 4 and any(
      folder.glob("*.orbax-checkpoint-tmp*")
    )

  kill_and_resume(whole, tmp_path, saving)


def test_killed_before_the_first_update(whole, tmp_path):
  ledger = tmp_path / "privacy_ledger.jsonl"
  killed = kill_and_resume(
    whole, tmp_path, lambda: ledger.exists() and ledger.stat().st_size > 0
  )
  assert killed < 12


def test_killed_and_resumed_by_the_same_command(whole, tmp_path):
  program = start(tmp_path)
  wait_for(program, lambda: num_releases(tmp_path) >= 8)
  program.kill()
  program.communicate()
  program = start(tmp_path)
  _, told = program.communicate(timeout=TIMEOUT)
  assert program.returncode == 0, told
  small_run.assert_same(whole, tmp_path)


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path):
  program = start(tmp_path, period=0)
  wait_for(program, lambda: num_releases(tmp_path) >= 5)
  program.terminate()
  _, told = program.communicate(timeout=TIMEOUT)
  assert program.returncode == 130, told
  step, _ = small_run.newest_state(tmp_path)
  assert 4 <= step < 12
  assert f"interrupted; update {step} is saved" in told
  assert "Traceback" not in told
  small_run.train(tmp_path, **OPTIONS)
  small_run.assert_same(whole, tmp_path)


def test_a_disk_that_is_full_for_a_while(whole, tmp_path):
  program = start(tmp_path, file_size_limit=6_000)
  _, told = program.communicate(timeout=TIMEOUT)
  assert program.returncode == 0, told
  assert "update 2 could not be saved: file too large. Training goes on" in told
  assert told.count("could not be saved") == 1
  small_run.assert_same(whole, tmp_path)


def test_a_disk_that_is_full_at_the_last_save(whole, tmp_path):
  program = start(tmp_path, file_size_limit=6_000, period=0)
  _, told = program.communicate(timeout=TIMEOUT)
  assert program.returncode == 2
  (error,) = [line for line in told.splitlines() if "dptrain: error" in line]
  assert "the final checkpoint (update 12) could not be saved" in error
  assert "run the same command again" in error
  small_run.train(tmp_path, **OPTIONS)
  small_run.assert_same(whole, tmp_path)
