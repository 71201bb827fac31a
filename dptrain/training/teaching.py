"""Who teaches a run in each update: chosen, kept, written down, replayed.

A teacher enters an update only after its weights are in MODEL_DIR and its name
is in the ledger, so that whoever repeats an update has the very same teachers.
Without them the noise of that update must not be used again: training then
forks (`Ledger.open_branch`).
"""

from collections.abc import Callable, Mapping
import hashlib
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from dptrain.models import masked_lm
from dptrain.privacy import branches
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import teachers as teachers_lib
from dptrain.reports import wording
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import exchange as exchange_lib
from dptrain.training import frozen_teacher
from dptrain.training import kept_weights
from dptrain.training import preparation as preparation_lib
from dptrain.training import processes
from dptrain.training import run as run_lib
from dptrain.training import teacher_checks

_POLL_SECONDS = 0.05


class Taught(NamedTuple):
  """Teachers of one update.

  Attributes:
    weight: of the distillation term.
    models: of each teacher.
    params: of each: trees of NumPy arrays.
    fingerprints: of each: equal ones are the same weights.
    names: of each, with its updates, in words.
  """

  weight: float
  models: tuple[masked_lm.MaskedLanguageModel, ...]
  params: tuple[Any, ...]
  fingerprints: tuple[str, ...]
  names: tuple[str, ...]


class Teaching:
  """The teachers of one run, and what it publishes for others.

  Formal guarantee: what is published are parameters after `step` updates, all
  of which the ledger that travels with them prices. What is learned are
  parameters of runs whose ledgers were read and found whole, under the same
  unit and relation; a run with a claim takes none from a run without. Both
  ledgers know of it before the update: `teachers.composed_epsilon` bounds what
  an observer of all of them sees.
  """

  def __init__(
    self,
    run: run_lib.TrainingRun,
    directory: pathlib.Path,
    ledger: ledger_lib.Ledger,
    prepared: preparation_lib.Preparation,
    exchange: exchange_lib.Exchange | None,
    say: Callable[[str], None],
  ):
    """Introduces the run to the others.

    Args:
      run: the user's settings.
      directory: MODEL_DIR.
      ledger: of it; only process 0 writes.
      prepared: of the run.
      exchange: with the other replicas; None: of the settings.
      say: told what a user should know.

    Raises:
      ValueError: another replica does not fit, or nothing can be published.
    """
    self._run, self._settings = run, run.codistillation
    self._ledger, self._prepared, self._say = ledger, prepared, say
    self._folder = directory / kept_weights.FOLDER
    self._kept = kept_weights.KeptWeights(self._folder)
    self._model = prepared.objective.model
    self._shapes = jax.eval_shape(self._model.bare_params, prepared.params)
    self._branch = ""
    self._now: tuple[int, tuple[str, ...]] = (-1, ())
    self._loaded: dict[str, Any] = {}
    self._said: set[str] = set()
    self._late: dict[int, int | None] = {}
    # Process 0's alone, as the ledger is.
    self._exchange: Any = exchange
    if run.codistillation.replicas > 1:
      processes.first(lambda: self._open(run.codistillation.exchange))

  def _open(self, path: str | None) -> None:
    self._folder.mkdir(exist_ok=True)
    if self._exchange is None:
      settings = self._settings
      if not path:
        raise ValueError(
          f"Codistillation.replicas={settings.replicas}, but"
          " Codistillation.exchange is not set: name a folder that all replicas"
          " share (`dptrain codistill` makes one)."
        )
      self._exchange = exchange_lib.SharedFolder(
        path, settings.replica, settings.keep, self._say_once
      )
    self._exchange.introduce(self._description())
    published = self._exchange.read(self._settings.replica, sys.maxsize)
    teacher_checks.check_own_ledger(self._ledger, published)

  def _description(self) -> dict[str, Any]:
    """What this run trains, for others to compare with theirs."""
    run, plan = self._run, self._prepared.plan
    shard = dict(self._prepared.shard or {})
    shard.pop("index", None)
    named = kept_weights.named(self._shapes)
    shapes = {name: list(leaf.shape) for name, leaf in named.items()}
    told = {
      "replicas": self._settings.replicas,
      "topology": self._settings.topology,
      "corpora": self._settings.corpora,
      "sequence_length": run.sequence_length,
      "vocabulary": self._prepared.vocabulary,
      "parameters": f"{len(shapes)} arrays, {_digest(repr(shapes))[:12]}",
      "unit": wording.unit(plan.as_dict()),
      "relation": plan.relation,
      "claim": not self._prepared.seed.fixed,
      "run": self._ledger.header["seed"],
    }
    if self._settings.corpora == "shards":
      told["shards"] = shard
    return told

  def begin(self, branch: str) -> None:
    """Trains on this branch from now on."""
    self._branch = branch

  def repeatable(self, branch: str, step: int) -> bool:
    """Whether all teachers of updates from `step` on are still in MODEL_DIR."""
    return all(
      self._has(lesson) for lesson in self._ledger.lessons.since(branch, step)
    )

  def offer(self, step: int, params: Any) -> None:
    """Publishes the parameters after `step` updates, if it is time to."""
    if self._looks(step):
      self.publish(step, params)

  def before_update(self, step: int) -> Taught | None:
    """Tells who teaches in update `step`, after a look if it is time.

    All processes call it.

    Returns:
      The teachers; None if there are none.

    Raises:
      OSError: they cannot be written down; do not make the update.
    """
    self._now = step, ()
    looks, weight = self._looks(step), self._run.distillation.weight_at(step)
    if weight == 0.0 or not self._run.learns:
      return None
    told = processes.first(lambda: self._names(self._lesson(step, looks)))
    if not told:
      return None
    fingerprints = tuple(fingerprint for _, fingerprint in told)
    self._now = step, fingerprints
    self._loaded = {each: self._weights(each) for each in fingerprints}
    return Taught(
      weight,
      tuple(map(self._model_of, fingerprints)),
      tuple(self._loaded[each] for each in fingerprints),
      fingerprints,
      tuple(name for name, _ in told),
    )

  def noise_branch(self, step: int) -> str:
    """What the noise of update `step` is bound to: branch and teachers.

    Other teachers make another sum, whose noise must be another, whatever was
    forgotten of the first: a copy of MODEL_DIR from before it, say.

    Args:
      step: an update whose teachers are known: this one, or an earlier one.
    """
    now, fingerprints = self._now
    if now != step:
      lesson = self._ledger.lessons.at(self._branch, step)
      taught = lesson and self._run.distillation.weight_at(step) > 0
      teachers = lesson.teachers if lesson is not None and taught else ()
      fingerprints = tuple(each.fingerprint for each in teachers)
    if not fingerprints:
      return self._branch
    return branches.name_of(self._branch, *fingerprints)

  def publish(self, step: int, params: Any) -> None:
    """Lets the others have the parameters after `step` updates.

    A failure is told, and training goes on: the others keep what they have.
    """
    if self._settings.replicas == 1:
      return
    arrays = self._model.bare_params(params)
    weights = _on_host(arrays)

    def write() -> None:
      try:
        self._exchange.publish(
          exchange_lib.Publication(
            self._settings.replica,
            step,
            weights,
            self._ledger.path.read_bytes(),
            checkpoints_lib.state_digest(weights),
            self._branch,
            arrays,
          )
        )
      except OSError as error:
        self._say(
          f"update {step} could not be published for the other replicas"
          f" ({error}): training goes on, and they learn from what they have"
        )

    processes.first(write)

  def placed(self, fingerprint: str) -> Any:
    """Weights that the exchange has put on this run's devices, or None."""
    if self._exchange is None:
      return None
    return self._exchange.placed(fingerprint, self._settings.replica)

  def forget(self, oldest: int) -> None:
    """Removes weights that no checkpoint needs any more.

    Args:
      oldest: updates in the oldest checkpoint that is kept.
    """

    def remove() -> None:
      needed = {
        teacher.fingerprint
        for lesson in self._ledger.lessons.since(self._branch, oldest)
        for teacher in lesson.teachers
      }
      self._kept.forget(needed)

    processes.first(remove)

  # --- who teaches ---------------------------------------------------------

  @staticmethod
  def _names(lesson: teachers_lib.Lesson) -> list[list[str]]:
    return [
      [f"{each.name} ({each.step})", each.fingerprint]
      for each in lesson.teachers
    ]

  def _lesson(self, step: int, looks: bool) -> teachers_lib.Lesson:
    """The lesson of update `step`, in the ledger."""
    lessons, branch = self._ledger.lessons, self._branch
    now = lessons.at(branch, step)
    if step <= self._ledger.last_step(branch) or lessons.begins_at(
      branch, step
    ):
      if now is None:
        raise ledger_lib.LedgerError(
          f"{self._ledger.path} does not tell who taught in update {step},"
          " which was made: restore the newest copy of it."
        )
      return now
    if now is not None and not looks and self._has(now):
      return now
    chosen = self._chosen(step)
    # All of it: what is said of the corpora may have been corrected.
    if now == chosen:
      return now
    self._ledger.record_lesson(branch, step, chosen)
    return chosen

  def _chosen(self, step: int) -> teachers_lib.Lesson:
    """Who shall teach from update `step` on."""
    found: list[teachers_lib.Teacher] = []
    sources: list[teachers_lib.Source] = []
    if (frozen := self._prepared.teacher) is not None:
      found.append(frozen.teacher)
      sources += frozen.sources
    for replica in self._settings.teachers:
      publication = self._newest(replica, step)
      if publication is None:
        continue
      try:
        source = self._checked(publication)
      except ValueError as error:
        self._say_once(
          f"replica {replica} does not teach from update {step} on: {error}"
        )
        continue
      self._kept.keep(publication.weights, publication.fingerprint)
      found.append(
        teachers_lib.Teacher(
          f"replica {replica}",
          publication.step,
          publication.fingerprint,
          source[0].run,
        )
      )
      sources += source
    own = self._ledger.header["seed"]
    others = [each for each in sources if each.run != own]
    return teachers_lib.Lesson(
      self._own_part(),
      tuple(found),
      teachers_lib.newest(others),
    )

  def _own_part(self) -> str:
    """Of the corpora: where this run's own units are."""
    settings, shard = self._settings, self._prepared.shard
    if settings.replicas > 1:
      return settings.part(settings.replica, shard, self._exchange.group())
    own = self._ledger.header["seed"]
    return self._run.teacher.part("the student", shard, own)

  def _looks(self, step: int) -> bool:
    settings = self._settings
    return settings.replicas > 1 and settings.looks_at(
      step, self._run.distillation.burn_in
    )

  def _newest(self, replica: int, step: int) -> exchange_lib.Publication | None:
    """What a replica published, if it is there and not too old."""
    self._wait(replica, step)
    found = self._exchange.read(replica, step)
    if found is None:
      self._say_once(
        f"replica {replica} has published nothing yet that can be read: it does"
        " not teach"
      )
      return None
    behind = step - found.step
    if behind > self._settings.max_staleness:
      self._say_once(
        f"replica {replica} published last after update {found.step}, {behind}"
        f" updates behind (Codistillation.max_staleness="
        f"{self._settings.max_staleness}): from update {step} on it does not"
        " teach, until it publishes again",
        f"stale {replica} {found.step}",
      )
      return None
    return found

  def _wait(self, replica: int, step: int) -> None:
    """Gives a teacher that is behind some time; none that was late before."""
    end = time.monotonic() + self._settings.wait_seconds
    while True:
      newest = self._exchange.newest_step(replica)
      if newest is not None and newest >= step:
        return
      if self._late.get(replica, -1) == newest:
        return
      if time.monotonic() >= end:
        self._late[replica] = newest
        return
      time.sleep(_POLL_SECONDS)

  def _checked(
    self, publication: exchange_lib.Publication
  ) -> tuple[teachers_lib.Source, ...]:
    """The run of a publication and those it learned from.

    Raises:
      ValueError: weights or ledger are not what may enter this run.
    """
    teacher_checks.check_weights(publication, self._shapes)
    replica, branch = publication.replica, publication.branch
    path = self._folder / f"replica_{replica}.ledger.jsonl"
    known = teacher_checks.newest_ledger(publication.ledger, path)
    kept_weights.write_whole(path, known)
    ledger = ledger_lib.Ledger(path)
    claim = not self._prepared.seed.fixed
    teacher_checks.check_ledger(ledger, self._ledger, claim=claim)
    teacher_checks.check_covers(ledger, branch, publication.step)
    shard = ledger.header.get("shard")
    if self._settings.corpora == "shards":
      teacher_checks.check_shard(shard, self._prepared.shard, replica)
    elif self._settings.corpora == "disjoint":
      teacher_checks.check_apart(shard, self._prepared.shard)
    group = self._exchange.group()
    return ledger.sources(self._settings.part(replica, shard, group))

  def _weights(self, fingerprint: str) -> Any:
    frozen = self._prepared.teacher
    if frozen is not None and fingerprint == frozen.teacher.fingerprint:
      return frozen.params
    if fingerprint in self._loaded:
      return self._loaded[fingerprint]
    return self._kept.load(fingerprint, self._shapes)

  def _model_of(self, fingerprint: str) -> masked_lm.MaskedLanguageModel:
    frozen = self._prepared.teacher
    if frozen is not None and fingerprint == frozen.teacher.fingerprint:
      return frozen.model
    return self._model.bare

  def _has(self, lesson: teachers_lib.Lesson) -> bool:
    """Whether all weights are at hand; the frozen teacher's always are."""
    return all(
      each.name == frozen_teacher.NAME or self._kept.has(each.fingerprint)
      for each in lesson.teachers
    )

  def _say_once(self, text: str, key: str = "") -> None:
    if (key or text) not in self._said:
      self._said.add(key or text)
      self._say(text)


def _on_host(params: Any) -> Mapping[str, np.ndarray]:
  return {
    name: np.array(checkpoints_lib.on_host(leaf))
    for name, leaf in kept_weights.named(params).items()
  }


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
