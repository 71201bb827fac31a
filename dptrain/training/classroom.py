"""What a loop calls around each update so that teachers take part in it.

Whoever trains calls `before_update` once per update and passes each physical
batch through what it returns; without teachers both do nothing.

Shapes: B physical batch.
"""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple

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


class Places(NamedTuple):
  """Where a loop wants its arrays; None, all of them: on jax's one device.

  Attributes:
    rows: sharding of a physical batch.
    whole: sharding of what is on every device.
    peers: shardings of parameters of the run's own model, as an update wants
      them; None: whole.
  """

  rows: Any = None
  whole: Any = None
  peers: Any = None


class Classroom:
  """The teachers of a run, on its devices.

  Attributes:
    places: where its arrays go; a loop with a mesh of its own sets it.
    names: who taught in the last update, with their updates, in words.
  """

  def __init__(
    self,
    run: run_lib.TrainingRun,
    prepared: preparation_lib.Preparation,
    teaching: teaching_lib.Teaching | None,
  ):
    """Takes the run and its teachers; None: nobody teaches or is taught."""
    self._run, self._prepared, self._teaching = run, prepared, teaching
    self.names: tuple[str, ...] = ()
    self.places = Places()
    if (layout := prepared.layout) is not None:
      model = prepared.objective.model
      peers = model.bare_params(layout.gathered_params)
      self.places = Places(layout.rows, layout.replicated, peers)
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
      return unchanged
    taught = self._teaching.before_update(step)
    self.names = () if taught is None else taught.names
    if taught is None:
      self._placed = {}
      return unchanged
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

  def noise_branch(self, branch: str, step: int) -> str:
    """What the noise of update `step` is bound to; `Teaching.noise_branch`."""
    if self._teaching is None:
      return branch
    return self._teaching.noise_branch(step)

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
        prepared.objective, self._run.distillation, models, self.places.rows
      )
    return self._programs[key]

  def _on_devices(self, fingerprint: str, model: Any, params: Any) -> Any:
    if self._teaching is not None:
      placed = self._teaching.placed(fingerprint)
      if placed is not None:
        # As a replay will have them: split otherwise, they round otherwise.
        return jax.device_put(placed, self.places.peers)
    places = self.places
    if places.whole is None:
      return jax.tree.map(jax.numpy.asarray, params)
    where = jax.tree.map(lambda _: places.whole, params)
    if (
      places.peers is not None and model is self._prepared.objective.model.bare
    ):
      where = places.peers
    return jax.tree.map(
      lambda x, place: jax.make_array_from_callback(
        x.shape, place, lambda index: x[index]
      ),
      params,
      where,
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
  burn_in, num_steps = run.distillation.burn_in, run.privacy.schedule.num_steps
  if run.learns and burn_in >= num_steps:
    progress_lib.say(
      f"Distillation.burn_in={burn_in} outlasts the run's {num_steps} updates:"
      " no teacher enters any of them. Lower it if that is not meant."
    )
  if run.codistillation.replicas > 1 or run.learns:
    teaching = teaching_lib.Teaching(
      run, directory, ledger, prepared, exchange, progress_lib.say
    )
  return Classroom(run, prepared, teaching)


def unchanged(batch: Any, examples_key: jax.Array) -> Any:
  """What `Classroom.before_update` returns where nobody teaches."""
  del examples_key
  return batch
