"""The same launch on other devices and processes trains the same."""

import re
import shutil
import socket

import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch
import small_run
import virtual_devices


@pytest.fixture(scope="module")
def one_device(begun, tmp_path_factory):
  """What comes after `begun` on one device."""
  directory = tmp_path_factory.mktemp("one") / "copy"
  shutil.copytree(begun, directory)
  small_launch.train(directory)
  return directory


@pytest.fixture(scope="module")
def eight(begun, tmp_path_factory):
  """Folder and words of `virtual_devices.py`."""
  out = tmp_path_factory.mktemp("eight")
  program = small_launch.start_program(virtual_devices.__file__, begun, out)
  (told,) = small_launch.finish(program)
  return out, told


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_eight_devices(one_device, eight, model_parallel):
  small_launch.assert_close(one_device, eight[0] / f"model_{model_parallel}")


def test_physical_batches_exchange_nothing(eight):
  first = re.search(r"collectives: accumulate (\d+), finish (\d+)", eight[1])
  # On 8 x 1: however many physical batches, they meet once per update.
  assert int(first[1]) == 0
  assert int(first[2]) > 0


def test_a_mesh_that_does_not_divide_the_batch(eight):
  assert "refused: Batch size (20) must be divisible by" in eight[1]
  assert not small_run.ledger_lines(eight[0] / "refused", "release")


def test_states_of_many_shapes_are_split_saved_and_restored(eight):
  split = re.findall(r"state \d: (\d+) arrays split", eight[1])
  assert [int(number) > 0 for number in split] == [True] * 3


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
