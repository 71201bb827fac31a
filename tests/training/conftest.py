"""Programs are compiled once per test session, and one run serves many tests.

Almost all the time of a small run goes into compiling it.
"""

import os
import pathlib
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest
import small_run


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
  """One folder of compiled programs for all workers and what they start."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  for name, value in {
    "jax_compilation_cache_dir": str(base / "compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  # Of what XLA says about loading a program on the machine that compiled it.
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  compilation_cache.reset_cache()


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
