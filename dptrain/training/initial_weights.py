"""Weights that a run starts from, instead of fresh ones."""

import dataclasses
import logging
import pathlib
from typing import Any
import zipfile

import jax
import numpy as np

from dptrain.privacy import ledger as ledger_lib
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import settings


@dataclasses.dataclass(frozen=True)
class InitialWeights:
  """Where training starts.

  Attributes:
    path: a MODEL_DIR (its newest checkpoint counts), or an .npz file of arrays
      whose names are the parameters', joined by "/". None: fresh parameters.
    declared_public: nothing of the private corpus went into them: ledger and
      report then name them as public, with their fingerprint. Otherwise the
      report says that they are outside the guarantee.
  """

  path: str | None = None
  declared_public: bool = False

  def __post_init__(self) -> None:
    settings.check_flag("InitialWeights.declared_public", self.declared_public)
    if self.declared_public and self.path is None:
      raise ValueError(
        "InitialWeights.declared_public=True, but InitialWeights.path is None:"
        " fresh parameters need no declaration."
      )

  def load(self, like: Any) -> Any:
    """Reads the weights.

    Args:
      like: tree of shapes that they must have.

    Returns:
      A tree as `like`, of NumPy arrays; None if no path is set.

    Raises:
      ValueError: there are none at `path`, or they do not fit.
    """
    if self.path is None:
      return None
    return load(self.path, like, "InitialWeights.path")

  def unprotected(self) -> str:
    """What to say of weights that are not declared public."""
    told = "The initial weights were given; if they were learned from this"
    path = pathlib.Path(self.path or "").expanduser()
    ledger_path = path / ledger_lib.LEDGER_FILE
    if ledger_path.exists():
      try:
        claim = not ledger_lib.Ledger(ledger_path).fixed_seed
      except ledger_lib.LedgerError:
        claim = False
      if not claim:
        return (
          f"{told} corpus, they may reveal it: the run that made them makes no"
          " privacy claim, or its ledger is damaged."
        )
      return (
        f"{told} corpus, the run that made them costs what its own ledger says:"
        " `dptrain report` composes several MODEL_DIRs."
      )
    return f"{told} corpus, they may reveal it."


def load(name: str, like: Any, setting: str) -> Any:
  """Reads weights that a user names.

  Args:
    name: a MODEL_DIR (its newest checkpoint counts), or an .npz file of arrays
      whose names are the parameters', joined by "/".
    like: tree of shapes that they must have.
    setting: what the user named them by, for messages.

  Returns:
    A tree as `like`, of NumPy arrays.

  Raises:
    ValueError: there are none at `name`, or they do not fit.
  """
  path, told = pathlib.Path(name).expanduser(), f"{setting}={name!r}"
  read = _read_npz if is_file(name) else _read_run
  return _fitted(read(path, told), like, told)


def is_file(name: str) -> bool:
  """Whether weights are in an .npz file, and not in a MODEL_DIR.

  Args:
    name: as the user wrote it.
  """
  return pathlib.Path(name).suffix == ".npz"


def newest_step(path: pathlib.Path) -> int:
  """Updates in the newest checkpoint of a MODEL_DIR; -1 if there is none.

  Args:
    path: MODEL_DIR.
  """
  folder = path / checkpoints_lib.CHECKPOINTS
  steps = (int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
  return max(steps, default=-1)


def _read_npz(path: pathlib.Path, told: str) -> dict[str, np.ndarray]:
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{told} cannot be read as .npz: {error}.") from error


def _read_run(path: pathlib.Path, told: str) -> dict[str, np.ndarray]:
  import orbax.checkpoint as ocp

  step = newest_step(path)
  if step < 0:
    raise ValueError(
      f"{told} is neither an .npz file nor a MODEL_DIR with a checkpoint."
    )
  # Orbax warns of a file that only its newer layouts have.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  folder = path / checkpoints_lib.CHECKPOINTS
  state = (folder / str(step) / "state").absolute()
  # Processes read one after another: none may wait for the others here.
  alone = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(),
    active_processes={jax.process_index()},
    barrier_sync_key_prefix=f"weights_{jax.process_index()}",
  )
  with ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
    multiprocessing_options=alone,
  ) as reader:
    tree = reader.metadata(state).item_metadata.tree
    plain = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    read = reader.restore(
      state, args=ocp.args.PyTreeRestore(restore_args=plain)
    )
  return {name: np.asarray(leaf) for name, leaf in _named(read["params"])}


def _named(tree: Any) -> list[tuple[str, Any]]:
  return [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _fitted(found: dict[str, np.ndarray], like: Any, told: str) -> Any:
  """The arrays in the structure of `like`; ValueError if one does not fit."""
  wanted = dict(_named(like))
  for name in sorted({*found, *wanted}):
    here = wanted[name].shape if name in wanted else "absent"
    there = found[name].shape if name in found else "absent"
    if here != there:
      raise ValueError(
        f"{told} is of another model: {name} is {there} there and {here} here."
        " Set that model's sizes, or give other weights."
      )
    if not np.isfinite(found[name]).all():
      raise ValueError(f"{told} holds numbers that are not finite, in {name}.")
  leaves = [
    np.asarray(found[name], leaf.dtype) for name, leaf in wanted.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
