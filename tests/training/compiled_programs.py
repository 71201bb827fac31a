"""Programs are compiled once per test session; that is most of its time."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep(tmp_path_factory):
  """One folder of compiled programs for all workers and what they start."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  # Whoever was started by a test of another session shares its folder.
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(base / "compiled"))
  for name, value in {
    "jax_compilation_cache_dir": folder,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  # Of what XLA says about loading a program on the machine that compiled it.
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  compilation_cache.reset_cache()
