"""What a ledger's lines say: parsed, checked, and asked.

`ledger.Ledger` writes them, and says which kinds there are.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import branches
from dptrain.privacy import chained_lines
from dptrain.privacy import entries
from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import rounds
from dptrain.privacy import teachers

FORMAT = 1
Branch = branches.Branch
LedgerError = chained_lines.LedgerError


class LedgerRecord:
  """All that the lines of one file say, over all branches.

  Formal guarantee: `releases()` composes what every line tells; a line that is
  wrong, missing or out of order makes the file unreadable, never cheaper.

  Attributes:
    path: the file.
    header: its first line, or an empty mapping for a new one.
    lessons: what was learned from other runs.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.header: dict[str, Any] = {}
    self._branches: dict[str, Branch] = {}
    self._environments: dict[str, list[tuple[int, str]]] = {}
    self._releases: dict[str, dict[int, entries.Update]] = {}
    self._others: list[others_lib.OtherRelease] = []
    self._unprotected: list[str] = []
    self._public: list[others_lib.DeclaredPublic] = []
    self.lessons = teachers.Lessons()
    self._lines = chained_lines.ChainedLines(path, self._take)

  @property
  def branches(self) -> tuple[Branch, ...]:
    """All branches, in the order in which they were opened."""
    return tuple(self._branches.values())

  @property
  def unprotected(self) -> tuple[str, ...]:
    """What was declared to be outside the guarantee."""
    return tuple(self._unprotected)

  @property
  def public(self) -> tuple[others_lib.DeclaredPublic, ...]:
    """What entered the run and was declared to be public."""
    return tuple(self._public)

  @property
  def others(self) -> tuple[others_lib.OtherRelease, ...]:
    """What was released beside the updates."""
    return tuple(self._others)

  @property
  def fixed_seed(self) -> bool:
    """Whether the run's seed is known to others: no privacy claim."""
    return bool(self.header.get("fixed_seed"))

  @property
  def head(self) -> str:
    """Hash of the last line: names all that is written so far."""
    return self._lines.head

  def source(self, part: str) -> teachers.Source:
    """All of it, as others see it who learn from this run.

    What entered it as public is among what it does not protect: for others it
    is one more thing to trust.

    Args:
      part: of the corpora that its units are in.
    """
    return teachers.Source(
      self.header["seed"],
      part,
      tuple(self.update_releases()),
      self.others,
      self.unprotected
      + tuple(
        f"{piece.what}: declared to be public, which is taken on trust"
        for piece in self._public
      ),
    )

  def sources(self, part: str = "") -> tuple[teachers.Source, ...]:
    """This run and all that it has learned from, each once.

    Args:
      part: of the corpora that its own units are in, if no lesson tells.
    """
    lessons = self.lessons.all()
    if lessons:
      parts = {lesson.part for lesson in lessons}
      part = parts.pop() if len(parts) == 1 else ""
    learned = (each for lesson in lessons for each in lesson.sources)
    # Whoever learned from it may have told of an earlier state of this run.
    others = (each for each in learned if each.run != self.header["seed"])
    return (self.source(part), *teachers.newest(others))

  def releases(self, without: str = "") -> list[accounting.Releases]:
    """Everything released so far, over all branches, equal ones joined.

    To be priced at `delta_left`, since others than updates may fail.

    Args:
      without: a branch to leave out.

    Returns:
      One release per round of each branch: the dearest of its updates; and one
      for each of `others`.
    """
    return accounting.merged(
      [*others_lib.releases(self._others), *self.update_releases(without)]
    )

  def update_releases(self, without: str = "") -> list[accounting.Releases]:
    """`releases` of the updates alone."""
    return accounting.merged(
      [
        release
        for branch, by_step in self._releases.items()
        if branch != without
        for release in entries.priced(by_step)
      ]
    )

  def delta_left(self, delta: float) -> float:
    """What of `delta` is left for `releases` by failures of `others`.

    Raises:
      ValueError: nothing.
    """
    return others_lib.delta_left(self._others, delta)

  def releases_in_order(self) -> list[accounting.Releases]:
    """One release per round of updates, branch after branch."""
    return [
      release
      for by_step in self._releases.values()
      for release in entries.priced(by_step)
    ]

  def num_releases(self, branch: str) -> int:
    """How many updates of `branch` are written down."""
    return len(self._releases.get(branch, {}))

  def last_step(self, branch: str) -> int:
    """The last update of `branch` written down; -1 if there is none."""
    return max(self._releases.get(branch, {-1: None}))

  def first_step(self, branch: str) -> int:
    """The update that a branch begins with."""
    return self._branches[branch].fork_step

  def has(self, branch: str, step: int) -> bool:
    """Whether update `step` of `branch` is written down."""
    return step in self._releases.get(branch, {})

  def segments(self) -> list[dict[str, Any]]:
    """Runs of equal consecutive releases as plain data: a checkpoint's copy."""
    return entries.runs(self._releases)

  def check_contains(self, segments: list[dict[str, Any]]) -> None:
    """Refuses a ledger that lacks what a checkpoint knows was released.

    Raises:
      LedgerError: the file was replaced by an older copy.
    """
    for branch, step, update in entries.unrolled(segments):
      if self._releases.get(branch, {}).get(step) != update:
        raise LedgerError(
          f"{self.path} lacks update {step} of branch {branch[:12]}, which a"
          " checkpoint beside it contains: the ledger was rolled back. Restore"
          " the newest copy of it; without it the guarantee is lost."
        )

  def check_checkpoints(self) -> None:
    """Refuses a ledger that lacks what the thin loop's checkpoints know.

    Those of t5x hold a digest among their arrays, which its trainer checks.

    Raises:
      LedgerError: the file was replaced by an older copy.
    """
    for path in sorted(
      self.path.parent.glob("checkpoints/*/metadata/metadata")
    ):
      try:
        told = json.loads(path.read_bytes())["ledger"]
      except (ValueError, KeyError, TypeError, OSError):
        continue  # a damaged checkpoint says nothing
      self.check_contains(told)

  def check_not_lost(self) -> None:
    """Refuses a MODEL_DIR that has checkpoints, of any loop, but no ledger.

    Raises:
      LedgerError: what was released is unknown.
    """
    folder = self.path.parent
    found = ("checkpoints/[0-9]*", "checkpoint_[0-9]*")
    if not self.header and any(any(folder.glob(name)) for name in found):
      raise LedgerError(
        f"{folder} has checkpoints but no ledger ({self.path.name}): what was"
        " released is unknown. Restore the ledger, or start in a new MODEL_DIR."
      )

  # --- lines ---------------------------------------------------------------

  def _take_release(self, entry: Mapping[str, Any]) -> None:
    branch, step = entry["branch"], entry["step"]
    if branch not in self._branches:
      raise ValueError(f"branch {branch[:12]} was never opened")
    expected = max(self.last_step(branch) + 1, self.first_step(branch))
    if step != expected:
      raise ValueError(f"update {step} stands where {expected} must")
    update = entries.from_dict(entry, step)
    sampling = self.header["plan"]["sampling"]
    if update.round != step and not rounds.several_updates(sampling):
      raise ValueError(f"under {sampling} each update is a round of its own")
    self._releases.setdefault(branch, {})[step] = update

  def _check_lesson(self, branch: str, step: int) -> None:
    if branch not in self._branches:
      raise ValueError(f"branch {branch[:12]} was never opened")
    if step < max(self.last_step(branch) + 1, self.first_step(branch)):
      raise ValueError(f"update {step} was made without its lesson")
    self.lessons.check_next(branch, step)

  def _take(self, entry: Mapping[str, Any]) -> None:
    kind = entry["kind"]
    if kind == "plan":
      if entry["format"] != FORMAT:
        raise ValueError(f"format {entry['format']} is not {FORMAT}")
      if self.header:
        raise ValueError("it has a second plan")
      plan = plan_lib.completed(entry["plan"])
      self.header = {**entry, "plan": plan}
    elif not self.header:
      raise ValueError("a ledger begins with its plan")
    elif kind == "branch":
      branch = Branch(**{name: entry[name] for name in Branch._fields})
      if branch.name in self._branches:
        raise ValueError(f"branch {branch.name[:12]} is opened again")
      self._branches[branch.name] = branch
      self._environments[branch.name] = [(branch.fork_step, branch.environment)]
    elif kind == "environment":
      self._environments[entry["branch"]].append(
        (entry["step"], entry["environment"])
      )
    elif kind == "release":
      self._take_release(entry)
    elif kind == "lesson":
      self._check_lesson(entry["branch"], entry["step"])
      lesson = teachers.from_dict(entry)
      self.lessons.add(entry["branch"], entry["step"], lesson)
    elif kind == "other":
      self._others.append(others_lib.from_dict(entry))
    elif kind == "unprotected":
      self._unprotected.append(entry["what"])
    elif kind == "public":
      told = entry["what"], entry["fingerprint"]
      self._public.append(others_lib.DeclaredPublic(*told))
    else:
      raise ValueError(f"unknown kind {kind!r}")
