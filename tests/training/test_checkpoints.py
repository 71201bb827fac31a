"""Checkpoints: whole or not at all, and never fatal to a run."""

import errno
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_run

from dptrain.privacy import ledger as ledger_lib
from dptrain.training import checkpoints as checkpoints_lib

CheckpointError = checkpoints_lib.CheckpointError
# Orbax's reader of a damaged checkpoint outlives its event loop.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def state(step, shape=(300, 7)):
  draw = np.random.default_rng(step)
  return {"params": {"w": draw.normal(size=shape).astype(np.float32)}}


def like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture
def opened(tmp_path):
  """Opens the checkpoints of one folder; what they say is in `.told`."""

  def open_(keep=3):
    told = []
    made = checkpoints_lib.Checkpoints(
      tmp_path, checkpoints_lib.CheckpointSettings(keep=keep), told.append
    )
    made.told = told
    return made

  return open_


def saved(opened, *steps, **options):
  with opened(**options) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(step), {"branch": "b", "ledger": []})
    checkpoints.finish(steps[-1])


def change_arrays(folder, change):
  """Changes all files that may hold arrays; Orbax keeps some arrays twice."""
  for path in (folder / "state").rglob("d/*"):
    path.write_bytes(change(path.read_bytes()))


def truncate(folder):
  change_arrays(folder, lambda data: data[: len(data) // 2])


def flip(folder):
  def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

  change_arrays(folder, flipped)


def lose_metadata(folder):
  shutil.rmtree(folder / "metadata")


def empty(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


DAMAGE = [truncate, flip, lose_metadata, empty]


def test_what_was_saved_comes_back(opened):
  saved(opened, 3, 7)
  with opened() as checkpoints:
    found = checkpoints.restore(like(state(7)))
  assert found.step == 7
  np.testing.assert_array_equal(
    found.state["params"]["w"], state(7)["params"]["w"]
  )
  assert (found.metadata["branch"], found.metadata["ledger"]) == ("b", [])
  assert checkpoints.told == []


def test_a_new_folder_has_none(opened):
  with opened() as checkpoints:
    assert checkpoints.restore(like(state(0))) is None


def test_only_the_newest_are_kept(opened, tmp_path):
  saved(opened, 1, 2, 3, 4, keep=2)
  kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert {name for name in kept if name.isdigit()} == {"3", "4"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_falls_back_and_is_set_aside(opened, tmp_path, damage):
  saved(opened, 1, 2)
  damage(tmp_path / "checkpoints" / "2")
  with opened() as checkpoints:
    found = checkpoints.restore(like(state(1)))
    assert found.step == 1
    (told,) = checkpoints.told
    assert told.startswith("checkpoint of update 2 is damaged")
    assert str(tmp_path / "damaged_checkpoints" / "2") in told
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    # The place is free again.
    checkpoints.save(2, state(2), {})
    checkpoints.finish(2)
  with opened() as checkpoints:
    assert checkpoints.restore(like(state(1))).step == 2


def test_none_is_whole(opened, tmp_path):
  saved(opened, 1, 2)
  for step in (1, 2):
    truncate(tmp_path / "checkpoints" / str(step))
  with (
    opened() as checkpoints,
    pytest.raises(CheckpointError, match=r"none of the 2 .*backup.*run again"),
  ):
    checkpoints.restore(like(state(1)))
  assert len(checkpoints.told) == 2


@pytest.mark.parametrize(
  "other",
  [
    state(1, shape=(300, 8)),
    state(1) | {"more": np.ones(2)},
    {"params": {}},
    {"params": {"w": np.zeros((300, 7), np.float16)}},
  ],
  ids=["shape", "more", "less", "dtype"],
)
def test_another_models_is_refused_but_not_touched(opened, tmp_path, other):
  saved(opened, 1)
  with (
    opened() as checkpoints,
    pytest.raises(CheckpointError, match="of another model or optimizer"),
  ):
    checkpoints.restore(like(other))
  assert (tmp_path / "checkpoints" / "1").is_dir()
  with opened() as checkpoints:
    assert checkpoints.restore(like(state(1))).step == 1


def test_leftovers_of_a_killed_save_are_ignored(opened, tmp_path):
  saved(opened, 1)
  draft = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1"
  shutil.copytree(tmp_path / "checkpoints" / "1", draft)
  with opened() as checkpoints:
    assert checkpoints.restore(like(state(1))).step == 1
    checkpoints.save(2, state(2), {})
    checkpoints.finish(2)
  assert not draft.exists()


@pytest.fixture
def full_disk(monkeypatch):
  """A list; while it is not empty, each save takes one off and fails."""
  save, planned = ocp.CheckpointManager.save, []

  def failing(self, *arguments, **options):
    if planned:
      planned.pop()
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save(self, *arguments, **options)

  monkeypatch.setattr(ocp.CheckpointManager, "save", failing)
  return planned


def test_a_failed_save_is_told_and_the_next_one_counts(opened, full_disk):
  saved(opened, 1)
  with opened() as checkpoints:
    full_disk.append("once")
    checkpoints.save(2, state(2), {})
    (told,) = checkpoints.told
    assert "update 2 could not be saved: no space left on device" in told
    assert "update 1 stays the newest" in told
    checkpoints.save(3, state(3), {})
    checkpoints.finish(3)
    assert len(checkpoints.told) == 1
  with opened() as checkpoints:
    assert checkpoints.restore(like(state(1))).step == 3


def test_a_failed_last_save_is_an_error(opened, full_disk):
  with opened() as checkpoints:
    full_disk.append("once")
    checkpoints.save(2, state(2), {})
    with pytest.raises(CheckpointError, match=r"final.*update 2.*run the same"):
      checkpoints.finish(2)


@pytest.mark.parametrize(
  ("name", "value"), [("period", -1), ("period", 2.5), ("keep", 0)]
)
def test_refuses_settings_out_of_range(name, value):
  with pytest.raises(ValueError, match=f"CheckpointSettings.{name}="):
    checkpoints_lib.CheckpointSettings(**{name: value})


# --- in whole runs -----------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_run_goes_on_from_the_checkpoint_before(
  finished, copy, damage, capfd
):
  damage(copy / "checkpoints" / "6")
  small_run.train(copy)
  assert "checkpoint of update 6 is damaged" in capfd.readouterr().err
  small_run.assert_same(finished, copy)


def test_a_run_without_any_whole_checkpoint(finished, copy, capfd):
  for step in (2, 4, 6):
    empty(copy / "checkpoints" / str(step))
  with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
    small_run.train(copy)
  assert "update 2 is damaged" in capfd.readouterr().err
  # As the message says: run again, and the same run is repeated.
  small_run.train(copy)
  small_run.assert_same(finished, copy)


def test_a_run_survives_a_full_disk(finished, tmp_path, full_disk, capfd):
  full_disk.append("once")
  small_run.train(tmp_path)
  told = capfd.readouterr().err
  assert "update 2 could not be saved: no space left on device" in told
  assert "Training goes on in memory; there is none" in told
  small_run.assert_same(finished, tmp_path)


def test_checkpoints_without_their_ledger(copy):
  (copy / "privacy_ledger.jsonl").unlink()
  with pytest.raises(ledger_lib.LedgerError, match="checkpoints but no ledger"):
    small_run.train(copy)


def test_a_ledger_older_than_the_checkpoints(copy):
  path = copy / "privacy_ledger.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:-1]))
  with pytest.raises(ledger_lib.LedgerError, match="rolled back"):
    small_run.train(copy)


def test_a_checkpoint_of_another_run(copy, tmp_path):
  other = pathlib.Path(tmp_path / "other")
  small_run.train(other, steps=2, sizes=(20, 40))
  shutil.rmtree(other / "checkpoints")
  shutil.copytree(copy / "checkpoints", other / "checkpoints")
  with pytest.raises(ledger_lib.LedgerError):
    small_run.train(other, steps=2, sizes=(20, 40))
