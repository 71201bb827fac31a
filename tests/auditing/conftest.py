"""Audits of small runs; programs are compiled once per test session."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
  """One folder of compiled programs for all workers and what they start."""
  import compiled_programs

  compiled_programs.keep(tmp_path_factory)
