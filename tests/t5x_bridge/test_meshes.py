"""The same launch on other devices and processes trains the same."""

import shutil
import socket

import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch


@pytest.fixture(scope="module")
def one_device(begun, tmp_path_factory):
  """What comes after `begun` on one device."""
  directory = tmp_path_factory.mktemp("one") / "copy"
  shutil.copytree(begun, directory)
  small_launch.train(directory)
  return directory


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_eight_devices(one_device, copy, model_parallel):
  (told,) = small_launch.finish(
    small_launch.start(copy, devices=8, mesh=model_parallel)
  )
  small_launch.assert_close(one_device, copy)
  if model_parallel == 1:
    # However many physical batches: they meet once per update.
    assert "collectives: accumulate 0, finish" in told
    assert "finish 0" not in told


def test_two_processes(one_device, copy):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  small_launch.finish(
    *(
      small_launch.start(copy, process=[address, 2, index])
      for index in range(2)
    )
  )
  small_launch.assert_close(one_device, copy)
