"""Replicas learn from each other under t5x as in the thin loop."""

import shutil

import numpy as np
import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import pairs
import small_launch
import small_run
from t5x import train as t5x_train

from dptrain.t5x_bridge import launch as launch_lib
from dptrain.training import loop

STEPS = 4
# What replica 1 published is there before replica 0 starts: nothing waits.
EXCHANGING = {"wait_seconds": 0.0, "period": 2, "keep": 9}


def replica(folder, number, name, **exchanging):
  return pairs.make_run(
    folder,
    number,
    model_dir=folder / name,
    exchanging={**EXCHANGING, "exchange": str(folder / "exchange")}
    | exchanging,
    steps=STEPS,
    optimizer="sgd",
    validation_split=None,
  )


def test_a_replica_under_t5x_is_one_of_the_thin_loop(tmp_path):
  records = small_run.records(validation=False)
  loop.train(replica(tmp_path, 1, "other"), records)
  copy = shutil.copytree(tmp_path / "exchange", tmp_path / "exchange_2")
  loop.train(replica(tmp_path, 0, "thin"), records)
  launch = launch_lib.Launch(
    replica(tmp_path, 0, "t5x", exchange=str(copy)), records
  )
  try:
    t5x_train.train(**small_launch.arguments(launch))
  finally:
    launch.close()
  told = [
    small_run.ledger_lines(tmp_path / name, "lesson")
    for name in ("thin", "t5x")
  ]
  assert [lesson["step"] for lesson in told[0]] == [0, 2]
  assert all(lesson["teachers"] for lesson in told[0])
  assert small_run.ledger_bytes(tmp_path / "thin") == small_run.ledger_bytes(
    tmp_path / "t5x"
  )
  _, thin = small_run.newest_state(tmp_path / "thin")
  _, state = small_launch.newest_state(tmp_path / "t5x")
  for name, array in small_launch.params(state).items():
    np.testing.assert_array_equal(thin[f"/params/{name}"], array, name)
  # Both published the same for replica 1.
  published = [
    sorted(path.name for path in folder.glob("replica_0/*.npz"))
    for folder in (tmp_path / "exchange", copy)
  ]
  assert len(published[0]) == 3
  assert [name[:17] for name in published[0]] == [
    name[:17] for name in published[1]
  ]
