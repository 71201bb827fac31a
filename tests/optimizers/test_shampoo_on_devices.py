"""Shampoo's roots on eight devices, in a process that has them."""

import os
import pathlib
import subprocess
import sys


def on_eight_devices(chosen):
  here = pathlib.Path(__file__).parent
  flags = [
    *(
      "--xla_backend_optimization_level=0",
      "--xla_llvm_disable_expensive_passes=true",
    ),
    "--xla_force_host_platform_device_count=8",
  ]
  env = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("PYTEST")
  } | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
      *("-c", os.devnull, "--rootdir", str(here), "--durations=8"),
      *("-k", chosen),
      str(here / "eight_devices_of_shampoo.py"),
    ],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_roots_are_shared_by_eight_devices():
  on_eight_devices("argument")


def test_bases_and_other_stacks_are_shared_by_eight_devices():
  on_eight_devices("not (argument)")
