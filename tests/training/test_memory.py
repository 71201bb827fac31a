"""The memory of an update does not grow with the number of its examples."""

import json
import pathlib
import subprocess
import sys

import small_run

LARGE = 65_536


def peak_kilobytes(directory, expected):
  """Peak resident memory of a program whose second update is that large."""
  options = {
    "steps": 2,
    "sizes": [256, expected],
    "noise": 50.0,
    "width": 8,
    "physical_batch_size": 256,
    "period": 0,
    # The same corpus in both; no validation records, to be quick.
    "corpus": {"num_examples": LARGE, "validation": False},
  }
  done = subprocess.run(
    [
      sys.executable,
      pathlib.Path(small_run.__file__),
      str(directory),
      json.dumps(options),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return int(done.stdout.split("peak ")[1])


def test_peak_memory_of_an_update(tmp_path):
  few = peak_kilobytes(tmp_path / "few", 256)
  many = peak_kilobytes(tmp_path / "many", LARGE)
  assert many < 1.05 * few
