"""Checkpoints by Orbax: asynchronous, a few kept, checked when read."""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from dptrain.training import processes
from dptrain.training import settings as settings_lib

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged_checkpoints"


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """When to save and how many to keep.

  Attributes:
    period: updates between checkpoints; 0 saves at the end only.
    keep: how many of the newest stay on disk.
  """

  period: int = 100
  keep: int = 3

  def __post_init__(self) -> None:
    settings_lib.check_whole("CheckpointSettings.period", self.period, least=0)
    settings_lib.check_whole("CheckpointSettings.keep", self.keep, least=1)


class Restored(NamedTuple):
  """A checkpoint that was read back whole.

  Attributes:
    step: updates that it contains.
    state: tree of arrays, as saved.
    metadata: plain data, as saved.
  """

  step: int
  state: Any
  metadata: dict[str, Any]


class Checkpoints:
  """The checkpoints of one MODEL_DIR.

  A save that fails (a full disk, say) is reported and the run goes on: its
  state is in memory, the checkpoint before stays, and the next period tries
  again.

  On several processes all call everything in the same order; each writes and
  reads the parts of arrays that it holds, and all take the same view of whether
  a checkpoint is whole.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    settings: CheckpointSettings,
    report: Callable[[str], None],
  ):
    # Orbax logs whole tracebacks of what is reported below in a sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self._root = directory.absolute()
    self._keep = settings.keep
    self._report = report
    self._saving: int | None = None
    self._manager = self._open()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, error: object, *_: object) -> None:
    # After an error of one process the others may not be listening.
    if error is None or jax.process_count() == 1:
      self._settle()
    self._manager.close()

  def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
    """Starts saving; reports how the save before this one ended.

    Args:
      step: updates that `state` contains.
      state: tree of arrays.
      metadata: plain data for JSON.
    """
    self._settle()
    if step in self._manager.all_steps():
      return
    if jax.process_count() == 1:
      # Copied: the arrays may be overwritten while Orbax writes.
      state = jax.tree.map(lambda x: np.array(x), jax.device_get(state))
    told = {
      **metadata,
      "step": step,
      "shapes": _shapes(state),
      "digest": state_digest(state),
    }

    def start() -> None:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(told)
        ),
        force=True,
      )

    try:
      self._saving = step
      processes.everywhere(start)
    except Exception as error:
      self._failed(error)

  def finish(self, step: int) -> None:
    """Waits until `step` is on disk.

    Raises:
      CheckpointError: it is not.
    """
    self._settle()
    if step not in self._manager.all_steps():
      raise CheckpointError(
        f"the final checkpoint (update {step}) could not be saved in"
        f" {self._root / CHECKPOINTS}: free space there and run the same"
        " command again; it repeats what came after the checkpoint before."
      )

  def oldest(self) -> int:
    """Updates in the oldest checkpoint that is kept; 0 if there is none."""
    return min(self._manager.all_steps(), default=0)

  def restore(self, like: Any) -> Restored | None:
    """Reads the newest checkpoint that is whole.

    Damaged ones are moved aside, and said to be.

    Args:
      like: tree of `jax.ShapeDtypeStruct`, the state's shapes.

    Returns:
      The checkpoint, or None if there never was one.

    Raises:
      CheckpointError: there are checkpoints, but none is whole; or the newest
        whole one is of another model or optimizer.
    """
    steps = processes.first(
      lambda: sorted(self._manager.all_steps(), reverse=True)
    )
    for step in steps:
      try:
        found = self._read(step, like)
      except CheckpointError:
        raise
      except Exception as error:
        self._report(
          f"checkpoint of update {step} is damaged ({_first_line(error)});"
          f" moved to {self._root / DAMAGED / str(step)}, falling back to the"
          " one before"
        )
        self._set_aside(step)
      else:
        return found
    if steps:
      raise CheckpointError(
        f"none of the {len(steps)} checkpoints in {self._root / CHECKPOINTS}"
        f" could be read; they are now in {self._root / DAMAGED}. Restore one"
        " from a backup, or run again to repeat the run from its start (that"
        " releases nothing new if nothing has changed)."
      )
    return None

  def _read(self, step: int, like: Any) -> Restored:
    def part(name: str, how: Any) -> Any:
      args = ocp.args.Composite(**{name: how})
      return processes.everywhere(
        lambda: self._manager.restore(step, args=args)[name]
      )

    metadata = part("metadata", ocp.args.JsonRestore())
    # Before the state: Orbax restores arrays of other shapes without a word.
    self._check_shapes(step, metadata["shapes"], _shapes(like))
    state = part("state", ocp.args.StandardRestore(like))
    if metadata["digest"] != state_digest(state):
      raise ValueError("its content does not match its digest")
    if metadata["step"] != step:
      raise ValueError(f"it is that of update {metadata['step']}, renamed")
    return Restored(step, state, metadata)

  def _check_shapes(
    self, step: int, found: dict[str, str], wanted: dict[str, str]
  ) -> None:
    names = [
      name
      for name in sorted({*found, *wanted})
      if found.get(name) != wanted.get(name)
    ]
    if names:
      name = names[0]
      more = f" (and {len(names) - 1} more arrays)" if names[1:] else ""
      raise CheckpointError(
        f"the checkpoint of update {step} in {self._root / CHECKPOINTS} is of"
        f" another model or optimizer: {name} is {found.get(name, 'absent')}"
        f" there and {wanted.get(name, 'absent')} here{more}. Restore those"
        " settings, or start in a new MODEL_DIR."
      )

  def _settle(self) -> None:
    """Waits for the save under way, if any, and reports its failure."""
    if self._saving is None:
      return
    try:
      processes.everywhere(self._manager.wait_until_finished)
      self._saving = None
    except Exception as error:
      self._failed(error)

  def _failed(self, error: Exception) -> None:
    steps = self._manager.all_steps()
    last = f"update {max(steps)} stays the newest" if steps else "there is none"
    self._report(
      f"the checkpoint of update {self._saving} could not be saved:"
      f" {_cause(error)}. Training goes on in memory; {last}. Free space in"
      f" {self._root / CHECKPOINTS}."
    )
    if processes.is_first():
      for draft in (self._root / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(draft, ignore_errors=True)
    self._saving = None

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    aside = self._root / DAMAGED

    def move() -> None:
      aside.mkdir(exist_ok=True)
      shutil.rmtree(aside / str(step), ignore_errors=True)
      shutil.move(self._root / CHECKPOINTS / str(step), aside / str(step))

    processes.first(move)
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._root / CHECKPOINTS,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        create=True,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
      item_names=("state", "metadata"),
    )


def _shapes(state: Any) -> dict[str, str]:
  """Names of a tree's arrays, with dtype and shape."""
  return {
    jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def state_digest(state: Any) -> str:
  """SHA-256 over the names, shapes, dtypes and bytes of a tree of arrays.

  The same however the arrays are spread over devices and processes; of what is
  spread over processes one array at a time is gathered, and all must call.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    array = np.ascontiguousarray(on_host(leaf))
    name = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}"
    digest.update(name.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def on_host(array: Any) -> np.ndarray:
  """An array whole; if it is spread over processes, all must call."""
  if isinstance(array, jax.Array) and not (
    array.is_fully_addressable or array.is_fully_replicated
  ):
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def _first_line(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200]


def _cause(error: Exception) -> str:
  text = str(error)
  for sign in ("No space left on device", "File too large", "Disk quota"):
    if sign in text:
      return f"{sign.lower()}"
  return _first_line(error)
