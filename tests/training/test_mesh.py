"""Training on a mesh of devices: the same as on one.

The devices are virtual ones of a process of its own, see `eight_devices.py`.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import together

from dptrain.training import mesh

FOLDER = pathlib.Path(__file__).parent


def on_eight_devices(*options, file="eight_devices.py"):
  """Runs tests of a file; its output is the assertion's."""
  flags = (
    f"{together.QUICK_TO_COMPILE} --xla_force_host_platform_device_count=8"
  )
  environment = dict(os.environ, XLA_FLAGS=flags)
  for name in list(environment):
    if name.startswith("PYTEST"):
      del environment[name]
  ran = subprocess.run(
    [
      sys.executable,
      *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
      *("-c", os.devnull, "--rootdir", FOLDER, "--durations=8"),
      *(FOLDER / file, *options),
    ],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stdout + ran.stderr
  return ran.stdout


def test_sum_and_noise_do_not_know_the_mesh():
  on_eight_devices("-k", "do_not_know_the_mesh")


def test_runs_go_on_on_another_mesh():
  on_eight_devices("-k", "another_mesh")


def test_an_update_is_that_of_one_device():
  on_eight_devices("-k", "that_of_one_device")


def test_layouts_and_compiled_programs():
  rest = "another_mesh or do_not_know_the_mesh or that_of_one_device"
  on_eight_devices("-k", f"not ({rest})")


@pytest.mark.parametrize(
  ("settings", "devices", "sizes"),
  [
    ({}, 1, (1, 1, 1)),
    ({}, 8, (8, 1, 1)),
    ({"model": 2}, 8, (4, 1, 2)),
    ({"fsdp": 2, "model": 2}, 8, (2, 2, 2)),
    ({"data": 2}, 8, (2, 1, 1)),
  ],
)
def test_sizes(settings, devices, sizes):
  assert mesh.MeshSettings(**settings).sizes(devices) == sizes


def test_several_processes_use_all_their_devices():
  with pytest.raises(ValueError, match=r"data=2.*the 2 processes have 4"):
    mesh.MeshSettings(data=2).sizes(4, num_processes=2)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"data": 0}, "MeshSettings.data=0"),
    ({"fsdp": None}, "MeshSettings.fsdp=None"),
    ({"model": 2.0}, "MeshSettings.model=2.0"),
    ({"rules": [("mlp", "data")]}, r"rules has \('mlp', 'data'\)"),
    ({"rules": ["mlp"]}, "rules has 'mlp'"),
  ],
)
def test_refuses_settings_out_of_range(settings, message):
  with pytest.raises(ValueError, match=message):
    mesh.MeshSettings(**settings)


def test_one_device_needs_no_layout():
  assert mesh.make_layout(mesh.MeshSettings(), model=None) is None
