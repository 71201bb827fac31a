"""What a run has learned from other runs, and what all of them cost together.

Whose predictions a run matches, it depends on: on their releases, and on those
of whomever they learned from. The ledger writes both down before the update
that they enter, so that a replay uses the very same teachers, and a report
composes them without asking anybody.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

from dptrain.privacy import accounting
from dptrain.privacy import others as others_lib

# How a division of corpora begins that is taken on trust.
DECLARED = "corpora declared to be disjoint"


class Teacher(NamedTuple):
  """Weights that predictions came from.

  Attributes:
    name: who it is, in words.
    step: updates that they contain.
    fingerprint: digest of the weights.
    run: of which run they are (`Source.run`); empty if declared public.
  """

  name: str
  step: int
  fingerprint: str
  run: str


class Source(NamedTuple):
  """What one run had released when something was learned from it.

  Attributes:
    run: names the run: keyed fingerprint of its seed.
    part: of the corpora: "DIVISION/NUMBER". No unit is in two parts of one
      division; of different divisions, or where it is empty, nothing is known.
    releases: its updates, merged.
    others: what it released beside them.
    unprotected: what its ledger says is outside its guarantee.
  """

  run: str
  part: str
  releases: tuple[accounting.Releases, ...]
  others: tuple[others_lib.OtherRelease, ...] = ()
  unprotected: tuple[str, ...] = ()

  @property
  def num_releases(self) -> int:
    """Of updates."""
    return sum(release.count for release in self.releases)


class Lesson(NamedTuple):
  """Teachers from some update on, until the next lesson of the same branch.

  Attributes:
    part: of the corpora that the learner's own units are in; see `Source`.
    teachers: none if their weight is 0.
    sources: their runs, and those that they learned from, directly or not.
  """

  part: str
  teachers: tuple[Teacher, ...]
  sources: tuple[Source, ...]

  def as_dict(self) -> dict[str, Any]:
    """Plain data."""
    return {
      "part": self.part,
      "teachers": [teacher._asdict() for teacher in self.teachers],
      "sources": [
        {
          "run": source.run,
          "part": source.part,
          "releases": [dataclasses.asdict(each) for each in source.releases],
          "others": [other.as_dict() for other in source.others],
          "unprotected": list(source.unprotected),
        }
        for source in self.sources
      ],
    }


def from_dict(told: Mapping[str, Any]) -> Lesson:
  """What `Lesson.as_dict` told, among other things."""
  return Lesson(
    told["part"],
    tuple(
      Teacher(**{name: each[name] for name in Teacher._fields})
      for each in told["teachers"]
    ),
    tuple(
      Source(
        each["run"],
        each["part"],
        tuple(accounting.Releases(**release) for release in each["releases"]),
        tuple(others_lib.from_dict(other) for other in each["others"]),
        tuple(each["unprotected"]),
      )
      for each in told["sources"]
    ),
  )


def newest(sources: Iterable[Source]) -> tuple[Source, ...]:
  """One source for each run: the one that knows of the most releases.

  A ledger only grows, so that this is its last state. What any state of it says
  beside its updates stays, whichever that is; where states of it are said to be
  in different parts, nothing is known.
  """
  found: dict[str, Source] = {}
  for source in sources:
    known = found.get(source.run)
    if known is None:
      found[source.run] = source
      continue
    last = source if _spent(source) >= _spent(known) else known
    found[source.run] = last._replace(
      part=last.part if source.part == known.part else "",
      others=tuple(dict.fromkeys(known.others + source.others)),
      unprotected=tuple(dict.fromkeys(known.unprotected + source.unprotected)),
    )
  return tuple(found.values())


def _spent(source: Source) -> tuple[int, float]:
  """Grows with a ledger: rounds, and within one the dearest of its updates."""
  probs = (each.count * each.sampling_prob for each in source.releases)
  return source.num_releases, math.fsum(probs)


def shard_part(shard: Mapping[str, Any] | None) -> str:
  """The part of a run on a shard (`Source.part`); empty for a whole corpus.

  Args:
    shard: of its ledger's header.
  """
  if shard is None:
    return ""
  return (
    f"{shard['count']} shards by {shard.get('by', 'unit')} of corpus"
    f" {shard['corpus']} by key {shard['key']}/{shard['index']}"
  )


def declared_part(by: str, number: int | str) -> str:
  """A part (`Source.part`) of corpora that somebody declares to be disjoint.

  Args:
    by: names who declares it, and of which corpora: two declarations are two
      divisions, since neither says anything of the other's corpora.
    number: of the part.
  """
  return f"{DECLARED} by {by}/{number}"


def by_part(sources: Sequence[Source]) -> dict[str, tuple[Source, ...]]:
  """Sources by the part of the corpora whose units they may have read.

  Args:
    sources: one for each run.

  Returns:
    By part. All under the one name "" if any two of them may share units
    though their parts differ.
  """
  divisions = {source.part.rpartition("/")[0] for source in sources}
  if len(divisions) > 1 or "" in divisions:
    return {"": tuple(sources)}
  parts: dict[str, tuple[Source, ...]] = {}
  for source in sources:
    parts[source.part] = (*parts.get(source.part, ()), source)
  return parts


def composed_epsilon(
  sources: Sequence[Source],
  delta: float,
  relation: str,
  *,
  quick: bool = False,
) -> accounting.Epsilon:
  """Smallest valid bound for all that several runs have released together.

  Formal guarantee: unit and relation: those of the runs, which must be the
  same. A unit is in one part at most, and what runs on other parts do is, given
  what they have seen of this one, the same for both neighbours: they only
  process its releases. So the part that costs most bounds all (parallel
  composition, adaptively). Within a part, or where runs may share units, the
  releases of all runs are one adaptive sequence (sequential composition). That
  parts share no unit is what the parts' names say: proven for shards of one
  corpus, on trust where it was declared. A vocabulary of one corpus has read
  the units of all of its shards, whichever runs' ledgers tell of it.

  Args:
    sources: one for each run, all of them.
    delta: of the guarantee.
    relation: a key of `accounting.RELATIONS`.
    quick: as in `accounting.epsilon`.

  Returns:
    The bound of the dearest part.

  Raises:
    ValueError: failures of other releases use up delta, or something has no
      price.
  """
  bounds = []
  parts = by_part(newest(sources))
  for part, runs in parts.items():
    readers = list(runs)
    if not part.startswith(DECLARED):
      readers = [run for each in parts.values() for run in each]
    # One vocabulary that several runs were given was released once.
    others = list(dict.fromkeys(o for run in readers for o in run.others))
    releases = others_lib.releases(others)
    for run in runs:
      releases += run.releases
    left = others_lib.delta_left(others, delta)
    bounds.append(accounting.epsilon(releases, left, relation, quick=quick))
  if not bounds:
    return accounting.epsilon((), delta, relation)
  return max(bounds, key=lambda bound: bound.value)


@dataclasses.dataclass(frozen=True)
class Lessons:
  """All lessons of a ledger.

  Attributes:
    by_branch: by branch and by the update that they begin with.
  """

  by_branch: dict[str, dict[int, Lesson]] = dataclasses.field(
    default_factory=dict
  )

  def check_next(self, branch: str, step: int) -> None:
    """Refuses a lesson that does not come after the last one of its branch.

    Raises:
      ValueError: names both updates.
    """
    last = max(self.by_branch.get(branch, {}), default=-1)
    if step <= last:
      raise ValueError(f"a lesson of update {step} stands after that of {last}")

  def add(self, branch: str, step: int, lesson: Lesson) -> None:
    """Takes the lesson that holds from update `step` on.

    Raises:
      ValueError: as `check_next`.
    """
    self.check_next(branch, step)
    self.by_branch.setdefault(branch, {})[step] = lesson

  def at(self, branch: str, step: int) -> Lesson | None:
    """The lesson that was learned in update `step`; None if there is none."""
    steps = self.by_branch.get(branch, {})
    before = [start for start in steps if start <= step]
    return steps[max(before)] if before else None

  def begins_at(self, branch: str, step: int) -> bool:
    """Whether a lesson begins with update `step`."""
    return step in self.by_branch.get(branch, {})

  def since(self, branch: str, step: int) -> list[Lesson]:
    """Those in force at update `step` or later."""
    steps = self.by_branch.get(branch, {})
    now = self.at(branch, step)
    later = [lesson for start, lesson in steps.items() if start > step]
    return ([] if now is None else [now]) + later

  def all(self) -> list[Lesson]:
    """Of all branches, in the order in which they were written."""
    return [
      lesson for steps in self.by_branch.values() for lesson in steps.values()
    ]
