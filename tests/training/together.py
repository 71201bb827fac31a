"""Starts several processes of one training run on this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import small_run

TIMEOUT = 120


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
  option = f"--xla_force_host_platform_device_count={devices}"
  environment = dict(os.environ, XLA_FLAGS=option, TF_CPP_MIN_LOG_LEVEL="3")
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for command in commands
  ]


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
  try:
    told = [program.communicate(timeout=TIMEOUT)[0] for program in programs]
  finally:
    for program in programs:
      program.kill()
  return [
    (program.returncode, text)
    for program, text in zip(programs, told, strict=True)
  ]


def wait_for(programs, condition):
  """Waits until `condition` holds."""
  end = time.monotonic() + TIMEOUT
  while not condition():
    if any(p.poll() is not None for p in programs) or time.monotonic() > end:
      for program in programs:
        program.kill()
      told = [program.communicate()[0] for program in programs]
      raise AssertionError("\n---\n".join(told))
    time.sleep(0.0005)


def num_releases(directory):
  """Counts the releases written so far; the last line may be half there."""
  path = directory / "privacy_ledger.jsonl"
  return path.read_bytes().count(b'"release"') if path.exists() else 0
