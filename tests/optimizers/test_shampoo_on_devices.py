"""Shampoo's roots on eight devices, in a process that has them."""

import os
import pathlib
import subprocess
import sys


def test_on_eight_devices():
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
      str(here / "eight_devices_of_shampoo.py"),
    ],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
