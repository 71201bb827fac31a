"""Runs that several tests look at; the whole folder skips without t5x."""

import os
import pathlib
import shutil
import sys

import pytest

# Of what XLA says about loading a program on the machine that compiled it.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
  import compiled_programs

  compiled_programs.keep(tmp_path_factory)


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
  """MODEL_DIR of a whole launch of 6 updates; copy it, never train in it."""
  import small_launch

  directory = tmp_path_factory.mktemp("launched")
  small_launch.train(directory)
  return directory


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
  """MODEL_DIR of the same launch, stopped cleanly after 2 updates."""
  import small_launch

  directory = tmp_path_factory.mktemp("begun")
  small_launch.train(directory, changes={"total_steps": 2})
  return directory


@pytest.fixture
def copy(begun, tmp_path):
  """A copy of `begun` to go on from."""
  return pathlib.Path(shutil.copytree(begun, tmp_path / "copy"))
