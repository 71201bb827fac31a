"""Breaks a copy of the package in one place and runs a test against it."""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import dptrain

PACKAGE = pathlib.Path(dptrain.__file__).parent
TESTS = pathlib.Path(__file__).parent


class Fault(NamedTuple):
  file: str
  right: str
  wrong: str
  caught_by: str


def run_in(folder: pathlib.Path, *command: str) -> subprocess.CompletedProcess:
  environment = dict(os.environ, PYTHONPATH=str(folder))
  for name in list(environment):
    if name.startswith(("PYTEST", "JAX_")):
      del environment[name]
  # What a fault leaves alone is compiled once; programs are known by content.
  environment |= {
    "JAX_COMPILATION_CACHE_DIR": str(_session(folder) / "compiled_copies"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
  }
  return subprocess.run(
    [sys.executable, *command],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
  )


def _session(folder: pathlib.Path) -> pathlib.Path:
  """Pytest's folder for all workers of this session."""
  for parent in folder.parents:
    if parent.parent.name.startswith("pytest-of-"):
      return parent
  return folder


def check_it_is_caught(fault: Fault, folder: pathlib.Path) -> str:
  """The test's output, after it has failed for the reason of an assertion."""
  ignore = shutil.ignore_patterns("__pycache__")
  shutil.copytree(PACKAGE, folder / "dptrain", ignore=ignore)
  shutil.copytree(TESTS, folder / "tests", ignore=ignore)
  broken = folder / "dptrain" / fault.file
  text = broken.read_text()
  assert text.count(fault.right) == 1, "the fault no longer fits the code"
  broken.write_text(text.replace(fault.right, fault.wrong))
  where = run_in(folder, "-c", "import dptrain; print(dptrain.__file__)")
  assert where.stdout.startswith(str(folder)), "not the copy would be tested"
  options = ["-q", "-x", "-p", "no:cacheprovider", "-c", os.devnull]
  test = str(folder / "tests" / fault.caught_by)
  ran = run_in(folder, "-m", "pytest", *options, "--rootdir", str(folder), test)
  assert ran.returncode == 1, ran.stdout + ran.stderr
  assert "AssertionError" in ran.stdout, ran.stdout + ran.stderr
  return ran.stdout
