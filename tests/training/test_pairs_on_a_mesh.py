"""Replicas as groups of one mesh: see `eight_devices_pairs.py`."""

import pairs
import pytest
import test_mesh

from dptrain.training import together

FILE = "eight_devices_pairs.py"


def test_collectives_and_interrupts():
  test_mesh.on_eight_devices("-k", "not changes_nothing", file=FILE)


@pytest.mark.long
def test_weights_by_a_collective_or_through_the_host():
  test_mesh.on_eight_devices("-k", "changes_nothing", file=FILE)


@pytest.mark.parametrize("numbers", [[0], [1, 0]])
def test_replicas_that_are_not_numbered_in_order(tmp_path, numbers):
  runs = [
    pairs.make_run(tmp_path, number, exchanging={"exchange": None})
    for number in numbers
  ]
  with pytest.raises(ValueError, match="number them in order"):
    together.train_together(runs)
