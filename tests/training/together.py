"""Starts several processes of one training run on this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import small_run

TIMEOUT = 120
QUICK_TO_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def flags(count):
  """Command-line flags of each of `count` processes."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return [
    [
      f"--coordinator_address=localhost:{port}",
      f"--process_count={count}",
      f"--process_index={index}",
    ]
    for index in range(count)
  ]


def start(commands, devices=1):
  """Starts one process for each command, with so many devices each."""
  flags = f"{QUICK_TO_COMPILE} --xla_force_host_platform_device_count={devices}"
  environment = dict(os.environ, XLA_FLAGS=flags, TF_CPP_MIN_LOG_LEVEL="3")
  return [
    _Program([sys.executable, *map(str, c)], environment) for c in commands
  ]


class _Program(subprocess.Popen):
  """Prints into a file, which cannot run full as a pipe does."""

  def __init__(self, command, environment):
    self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115
    super().__init__(
      command, env=environment, stdout=self._told, stderr=subprocess.STDOUT
    )

  def told(self):
    self._told.seek(0)
    return self._told.read()


def train(directories, count, devices=1, **options):
  """Starts `count` processes that train in one MODEL_DIR, or in one each."""
  if not isinstance(directories, list):
    directories = [directories] * count
  told = options.pop("each", [{}] * count)
  return start(
    [
      [
        pathlib.Path(small_run.__file__),
        directory,
        json.dumps({"mesh": {}, **options, **own}),
        *flag,
      ]
      for directory, own, flag in zip(
        directories, told, flags(count), strict=True
      )
    ],
    devices,
  )


def ended(programs):
  """Waits for all; pairs of exit status and what was printed."""
  end = time.monotonic() + TIMEOUT
  while any(p.poll() is None for p in programs) and time.monotonic() < end:
    if any(program.poll() for program in programs):
      # The others end soon, or else only when they miss its heartbeat.
      end = min(end, time.monotonic() + 10)
    time.sleep(0.05)
  for program in programs:
    program.kill()
  return [(program.wait(), program.told()) for program in programs]


def wait_for(programs, condition):
  """Waits until `condition` holds."""
  end = time.monotonic() + TIMEOUT
  while not condition():
    if any(p.poll() is not None for p in programs) or time.monotonic() > end:
      raise AssertionError(ended(programs))
    time.sleep(0.0005)


def num_releases(directory):
  """Counts the releases written so far; the last line may be half there."""
  path = directory / "privacy_ledger.jsonl"
  return path.read_bytes().count(b'"release"') if path.exists() else 0
