"""What reports say of teachers: who they were, and what all of them cost."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import teachers
from dptrain.reports import layout

_PARALLEL = (
  "parallel composition: each unit is in one of the {}, and what others learn"
  " of it they learn from releases that this bound covers"
)


@dataclasses.dataclass(frozen=True)
class Taught:
  """A run that learned from others, and what it cost with them.

  Attributes:
    epsilon: of everything that this run, its teachers and theirs had released.
    composed_by: how, in words.
    alone: epsilon of this run's own releases.
    runs: of every other run: its name (a fingerprint), by which name it taught
      (empty if only teachers learned from it), how often, the updates in its
      newest weights, its epsilon alone.
    unprotected: what their ledgers say, beside this run's own.
  """

  epsilon: accounting.Epsilon
  composed_by: str
  alone: float
  runs: list[dict[str, Any]]
  unprotected: list[str]

  def as_dict(self) -> dict[str, Any]:
    """Plain data."""
    told = dataclasses.asdict(self) | {"epsilon": self.epsilon.as_dict()}
    del told["unprotected"]
    told["alone"] = _plain(self.alone)
    told["runs"] = [
      run | {"epsilon": _plain(run["epsilon"])} for run in self.runs
    ]
    return told

  def facts(self) -> list[tuple[str, str]]:
    """Pairs of a name and a value."""
    rows = [("composed by", self.composed_by)]
    alone = f"epsilon {layout.rounded_up(self.alone)} alone"
    rows.append(("this run", alone))
    for run in self.runs:
      name = run["taught_as"] or "teacher of a teacher"
      told = f"run {run['run'][:12]}, {layout.rounded_up(run['epsilon'])} alone"
      if run["taught_as"]:
        told += (
          f"; {run['lessons']} time(s) new weights, last of update"
          f" {run['last_step']}"
        )
      rows.append((name, told))
    return rows


def taught(
  ledger: ledger_lib.Ledger, delta: float, relation: str
) -> Taught | None:
  """Composes a run with those that it learned from; None if it did not.

  Args:
    ledger: of the run.
    delta: of the guarantee.
    relation: a key of `accounting.RELATIONS`.
  """
  lessons = ledger.lessons.all()
  if not any(lesson.sources for lesson in lessons):
    return None
  own, *others = ledger.sources()
  by_run: dict[str, list[teachers.Teacher]] = {}
  for lesson in lessons:
    for teacher in lesson.teachers:
      by_run.setdefault(teacher.run, []).append(teacher)
  runs = []
  for source in others:
    known = by_run.get(source.run, [])
    runs.append(
      {
        "run": source.run,
        "taught_as": known[-1].name if known else "",
        "lessons": len({teacher.fingerprint for teacher in known}),
        "last_step": max((teacher.step for teacher in known), default=0),
        "epsilon": _alone(source, delta, relation),
      }
    )
  told = [
    f"Of a run that taught this one: {text}"
    for source in others
    for text in source.unprotected
    if text not in own.unprotected
  ]
  return Taught(
    epsilon=teachers.composed_epsilon([own, *others], delta, relation),
    composed_by=composed_by([own, *others]),
    alone=_alone(own, delta, relation),
    runs=runs,
    unprotected=list(dict.fromkeys(told)),
  )


def composed_by(sources: Sequence[teachers.Source]) -> str:
  """How several runs compose, in words.

  Args:
    sources: one for each run.
  """
  parts = teachers.by_part(sources)
  if "" in parts:
    return "sequential composition: all runs may have read the same units"
  if next(iter(parts)).startswith(teachers.DECLARED):
    return _PARALLEL.format("corpora (declared, and taken on trust)")
  return _PARALLEL.format("shards of one corpus (by a keyed hash)")


def _plain(value: float) -> Any:
  return "inf" if value == math.inf else value  # JSON has no infinity


def _alone(source: teachers.Source, delta: float, relation: str) -> float:
  return teachers.composed_epsilon([source], delta, relation).value
