"""What a loop calls around each update so that teachers take part in it.

Whoever trains calls `before_update` once per update and passes each physical
batch through what it returns; without teachers both do nothing.

Shapes: B physical batch.
"""

from collections.abc import Callable
import pathlib
from typing import Any

import jax
import numpy as np

from dptrain.privacy import ledger as ledger_lib
from dptrain.training import exchange as exchange_lib
from dptrain.training import preparation as preparation_lib
from dptrain.training import programs as programs_lib
from dptrain.training import progress as progress_lib
from dptrain.training import run as run_lib
from dptrain.training import teaching as teaching_lib

AddTargets = Callable[[Any, jax.Array], Any]


class Classroom:
  """The teachers of a run, on its devices."""

  def __init__(
    self,
    run: run_lib.TrainingRun,
    prepared: preparation_lib.Preparation,
    teaching: teaching_lib.Teaching | None,
  ):
    """Takes the run and its teachers; None: nobody teaches or is taught."""
    self._run, self._prepared, self._teaching = run, prepared, teaching
    self._programs: dict[Any, Callable[..., Any]] = {}
    self._placed: dict[str, Any] = {}

  def repeatable(self, step: int) -> Callable[[str], bool]:
    """For `Ledger.open_branch`, from a checkpoint after `step` updates."""
    if self._teaching is None:
      return lambda branch: True
    teaching = self._teaching
    return lambda branch: teaching.repeatable(branch, step)

  def begin(self, branch: str) -> None:
    """Trains on this branch from now on."""
    if self._teaching is not None:
      self._teaching.begin(branch)

  def offer(self, step: int, params: Any) -> None:
    """See `Teaching.offer`; before `before_update` of the same step."""
    if self._teaching is not None:
      self._teaching.offer(step, params)

  def before_update(self, step: int) -> AddTargets:
    """Looks for teachers if it is time; see `Teaching.before_update`.

    Returns:
      (physical batch, the update's examples key) -> the batch that
      `PrivateStep.accumulate` takes: with teachers' predictions, if there are
      any.
    """
    if self._teaching is None:
      return _unchanged
    taught = self._teaching.before_update(step)
    if taught is None:
      self._placed = {}
      return _unchanged
    before = self._placed
    self._placed = {
      name: before[name] if name in before else self._on_devices(name, *own)
      for name, *own in zip(
        taught.fingerprints, taught.models, taught.params, strict=True
      )
    }
    teachers = tuple(self._placed[name] for name in taught.fingerprints)
    program, weight = self._program(taught.models), np.float32(taught.weight)
    return lambda batch, key: program(teachers, batch, key, weight)

  def forget(self, oldest: int) -> None:
    """See `Teaching.forget`."""
    if self._teaching is not None:
      self._teaching.forget(oldest)

  def end(self, step: int, params: Any) -> None:
    """Publishes the last parameters, for those who are still training."""
    if self._teaching is not None:
      self._teaching.publish(step, params)

  def _program(self, models: Any) -> Callable[..., Any]:
    # By identity: teachers' models are few, and live as long as the run.
    key = tuple(map(id, models))
    if key not in self._programs:
      prepared = self._prepared
      self._programs[key] = programs_lib.make_targets(
        prepared.objective, self._run.distillation, models, prepared.layout
      )
    return self._programs[key]

  def _on_devices(self, fingerprint: str, model: Any, params: Any) -> Any:
    if self._teaching is not None:
      placed = self._teaching.placed(fingerprint)
      if placed is not None:
        return placed
    layout, own = self._prepared.layout, self._prepared.objective.model
    if layout is None:
      return jax.tree.map(jax.numpy.asarray, params)
    if model is own.bare:
      places = own.bare_params(layout.gathered_params)
    else:  # another architecture: whole everywhere
      places = jax.tree.map(lambda _: layout.replicated, params)
    return jax.tree.map(
      lambda x, place: jax.make_array_from_callback(
        x.shape, place, lambda index: x[index]
      ),
      params,
      places,
    )


def make_classroom(
  run: run_lib.TrainingRun,
  directory: pathlib.Path,
  ledger: ledger_lib.Ledger,
  prepared: preparation_lib.Preparation,
  exchange: exchange_lib.Exchange | None = None,
) -> Classroom:
  """The classroom of a run; all its refusals happen here.

  Args:
    run: the user's settings.
    directory: MODEL_DIR.
    ledger: of it.
    prepared: of the run.
    exchange: with other replicas, instead of the run's folder.

  Raises:
    ValueError: another replica does not fit, or nothing can be published.
  """
  teaching = None
  if run.codistillation.replicas > 1 or run.learns:
    teaching = teaching_lib.Teaching(
      run, directory, ledger, prepared, exchange, progress_lib.say
    )
  return Classroom(run, prepared, teaching)


def _unchanged(batch: Any, examples_key: jax.Array) -> Any:
  del examples_key
  return batch
