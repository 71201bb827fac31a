"""Programs are compiled once per test session, and one run serves many tests.

Almost all the time of a small run goes into compiling it.
"""

import pathlib
import shutil

import compiled_programs
import pytest
import small_run


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
  """One folder of compiled programs for all workers and what they start."""
  compiled_programs.keep(tmp_path_factory)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  """MODEL_DIR of a whole run of 6 updates; copy it, never train in it."""
  directory = tmp_path_factory.mktemp("finished")
  small_run.train(directory)
  return directory


@pytest.fixture
def copy(finished, tmp_path):
  """A copy of `finished` to work on."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))
