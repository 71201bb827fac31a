"""Weights of teachers in MODEL_DIR, by their fingerprints, for replays."""

from collections.abc import Collection, Mapping
import io
import os
import pathlib
import secrets
import time
from typing import Any

import jax
import numpy as np

from dptrain.privacy import ledger as ledger_lib
from dptrain.training import checkpoints as checkpoints_lib

FOLDER = "teachers"
_SHARED_FILE_SECONDS = 20


class KeptWeights:
  """The files of one folder."""

  def __init__(self, folder: pathlib.Path):
    """Takes the folder, which need not exist yet."""
    self._folder = folder

  def has(self, fingerprint: str) -> bool:
    """Whether weights are kept."""
    return self._path(fingerprint).exists()

  def keep(self, weights: Mapping[str, np.ndarray], fingerprint: str) -> None:
    """Writes weights, on disk when this returns.

    Args:
      weights: arrays by the names of the parameters.
      fingerprint: `checkpoints.state_digest` of them.

    Raises:
      OSError: they could not be written.
    """
    if self.has(fingerprint):
      return
    file = io.BytesIO()
    arrays: Any = dict(weights)
    np.savez(file, **arrays)
    write_whole(self._path(fingerprint), file.getvalue())

  def load(self, fingerprint: str, like: Any) -> Any:
    """Reads weights.

    Args:
      fingerprint: of them.
      like: tree of the parameters' shapes.

    Returns:
      A tree as `like`, of NumPy arrays.

    Raises:
      LedgerError: they are not what was kept.
    """
    path = self._path(fingerprint)
    self._await(path)
    try:
      with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    except Exception as error:
      raise _damaged(path) from error
    if checkpoints_lib.state_digest(found) != fingerprint:
      raise _damaged(path)
    leaves = [found[name] for name in named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def forget(self, needed: Collection[str]) -> None:
    """Removes all weights but those of these fingerprints."""
    for path in self._folder.glob("*.npz"):
      if path.stem not in needed:
        path.unlink(missing_ok=True)

  def _await(self, path: pathlib.Path) -> None:
    # Of several processes, others may see a new file some time after the first.
    end = time.monotonic() + _SHARED_FILE_SECONDS
    while jax.process_count() > 1 and not path.exists():
      if time.monotonic() > end:
        return
      time.sleep(0.1)

  def _path(self, fingerprint: str) -> pathlib.Path:
    return self._folder / f"{fingerprint}.npz"


def named(tree: Any) -> dict[str, Any]:
  """Leaves of a tree by their names, joined by "/"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Under another name first, and on disk before it gets its own.

  Args:
    path: the file.
    data: its content.

  Raises:
    OSError: nothing has changed.
  """
  draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  try:
    with open(draft, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    draft.replace(path)
  except BaseException:
    draft.unlink(missing_ok=True)
    raise


def _damaged(path: pathlib.Path) -> ledger_lib.LedgerError:
  return ledger_lib.LedgerError(
    f"{path} is damaged: remove it and start again. Updates that it taught in"
    " are then made anew, on a branch of their own."
  )
