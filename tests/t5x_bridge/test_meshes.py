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


def test_eight_devices(one_device, begun, tmp_path):
  # One test, since workers would each make what several tests share.
  program = small_launch.start_program(
    virtual_devices.__file__, begun, tmp_path
  )
  (told,) = small_launch.finish(program)
  for model_parallel in (1, 2):
    directory = tmp_path / f"model_{model_parallel}"
    small_launch.assert_close(one_device, directory)

  # On 8 x 1: however many physical batches, they meet once per update.
  first = re.search(r"collectives: accumulate (\d+), finish (\d+)", told)
  assert int(first[1]) == 0
  assert int(first[2]) > 0

  assert "refused: Batch size (20) must be divisible by" in told
  assert not small_run.ledger_lines(tmp_path / "refused", "release")

  split = re.findall(r"state \d: (\d+) arrays split", told)
  assert [int(number) > 0 for number in split] == [True] * 5


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
