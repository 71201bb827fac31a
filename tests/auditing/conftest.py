"""Audits of small runs; programs are compiled once per test session."""

import pathlib
import sys
from unittest import mock

import pytest

# For these imports only: two folders with a conftest must not both stay on it.
TRAINING = str(pathlib.Path(__file__).parents[1] / "training")
with mock.patch.object(sys, "path", [TRAINING, *sys.path]):
  import compiled_programs
  import small_run  # noqa: F401, for small_audit


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
  """One folder of compiled programs for all workers and what they start."""
  compiled_programs.keep(tmp_path_factory)
