"""Several replicas in one process, each on a group of its devices, in step."""

from collections.abc import Sequence
import contextlib

import jax
import numpy as np

from dptrain.training import loop
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib
from dptrain.training import shared_mesh


def train_together(
  runs: Sequence[run_lib.TrainingRun],
  records: Sequence[records_lib.Records] | None = None,
) -> list[run_lib.TrainingResult]:
  """Trains replicas that exchange weights by collectives.

  Each is a run as `loop.train` knows it, with a MODEL_DIR, a ledger and a plan
  of its own, on its own group of devices; its programs know nothing of the
  others. Whoever is behind, after a crash, say, goes first; then all go in
  step, and a look finds what the others published after the same update.

  Formal guarantee: that of `loop.train` for each, and of
  `teachers.composed_epsilon` for all together.

  Args:
    runs: replica 0, replica 1, ...
    records: of each, instead of the runs' tasks.

  Returns:
    How each of them ended.

  Raises:
    ValueError: bad input, before anything is spent.
    KeyboardInterrupt: interrupted, after saving what was done.
  """
  groups = _groups(runs)
  exchange = shared_mesh.SharedMesh(len(runs))
  with contextlib.ExitStack() as stack:
    rounds = {}
    for number, run in enumerate(runs):
      begun = loop.begin(
        stack,
        run,
        records[number] if records is not None else None,
        exchange,
        groups[number],
      )
      rounds[number] = begun.rounds()
    made = dict.fromkeys(rounds, -1)
    results = {}
    try:
      while rounds:
        first = min(made[number] for number in rounds)
        for number in [n for n in rounds if made[n] == first]:
          try:
            made[number] = next(rounds[number])
          except StopIteration as end:
            results[number] = end.value
            del rounds[number]
    except KeyboardInterrupt:
      for each in rounds.values():
        # Each saves what it has; one that was interrupted itself has done so.
        with contextlib.suppress(KeyboardInterrupt, StopIteration):
          each.throw(KeyboardInterrupt())
      raise
  return [results[number] for number in range(len(runs))]


def _groups(runs: Sequence[run_lib.TrainingRun]) -> list[list[jax.Device]]:
  """Equal groups of this process's devices."""
  devices = jax.devices()
  if jax.process_count() > 1:
    raise ValueError(
      f"replicas on one mesh train in one process, not {jax.process_count()}:"
      " give each its own processes, and a folder as"
      " Codistillation.exchange."
    )
  for number, run in enumerate(runs):
    told = run.codistillation
    if (told.replicas, told.replica) != (len(runs), number):
      raise ValueError(
        f"run {number} of {len(runs)} has Codistillation.replica="
        f"{told.replica} and replicas={told.replicas}; number them in order."
      )
    if run.mesh != runs[0].mesh:
      raise ValueError(
        "replicas on one mesh need equal groups: MeshSettings of replica"
        f" {number} are not those of replica 0."
      )
  if len(devices) % len(runs):
    raise ValueError(
      f"{len(devices)} devices cannot be divided into {len(runs)} equal groups:"
      " choose another number of replicas, or let each train in a process of"
      " its own (`dptrain codistill` without --one_mesh)."
    )
  return [list(group) for group in np.split(np.array(devices), len(runs))]
