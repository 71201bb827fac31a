"""The ledger: what was released, written down before it happens.

One append-only file of JSON lines lives in MODEL_DIR, outside the checkpoints,
so that going back to an earlier checkpoint cannot forget what later ones have
told. Each line carries the hash of the line before it. Eight kinds of line:

  plan         the plan, the keyed fingerprints of corpus and seed; the first.
  branch       a line of training that starts at the root or forks off another.
  environment  a branch goes on under another rounding from some update on.
  release      one update of one branch: its sampling, its noise and, if it
               shares one with others, its round (`rounds`).
  lesson       whose predictions a branch learns from, from some update on
               (`teachers`).
  other        what else was released on the same corpus (`others`).
  unprotected  something that was published without protection.
  public       something that entered the run and was declared to be public.

A branch is named by a digest of all that decides its gradients. A crash that
replays the same run finds its releases already written and adds none; whoever
continues differently opens another branch, whose keys are fresh and whose
releases are priced on top of everything that any branch ever wrote.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import branches
from dptrain.privacy import chained_lines
from dptrain.privacy import entries
from dptrain.privacy import ledger_record
from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import teachers

LEDGER_FILE = "privacy_ledger.jsonl"
LedgerError = chained_lines.LedgerError
Branch = branches.Branch


class Ledger(ledger_record.LedgerRecord):
  """The ledger of one MODEL_DIR; use `opened` to write and `read` to report.

  Formal guarantee: every release is on disk (fsync) before the parameters that
  contain it exist, whether or not they are ever saved; `releases()` composes
  all of them, over all branches. An upper bound on what an observer of all
  checkpoints, of all branches, has seen.
  """

  def start(
    self,
    plan: plan_lib.PrivacyPlan,
    *,
    corpus: str,
    seed: str,
    fixed_seed: bool,
    shard: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes the header, or checks that the one on disk tells the same.

    Args:
      plan: the plan of this run.
      corpus: keyed fingerprint of the training records.
      seed: keyed fingerprint of the seed itself.
      fixed_seed: whether the seed is known to others.
      shard: which shard of a corpus the records are; None: no shard.

    Raises:
      LedgerError: MODEL_DIR belongs to another plan, corpus or seed; names each
        difference.
    """
    told = {
      "kind": "plan",
      "format": ledger_record.FORMAT,
      "plan": json.loads(json.dumps(plan.as_dict())),
      "corpus": corpus,
      "seed": seed,
      "fixed_seed": fixed_seed,
    }
    if shard is not None:
      told["shard"] = dict(shard)
    if not self.header:
      self._append(told)
      return
    found = plan_lib.differences(self.header["plan"], told["plan"])
    if self.header["seed"] != seed:
      found.append("the secret seed is another one")
    elif self.header.get("shard") != told.get("shard"):
      found.append(
        "the records are another shard, or a shard of another corpus"
      )
    elif self.header["corpus"] != corpus:
      found.append("the content of the training records is not the same")
    if found:
      raise LedgerError(
        f"{self.path.parent} belongs to another plan: {'; '.join(found)}. What"
        " it has released is priced under its own plan: restore that setting,"
        " or start in a new MODEL_DIR."
      )

  def open_branch(
    self,
    *,
    checkpoint_branch: str,
    checkpoint_step: int,
    lineage: str,
    environment: str,
    state: str = "",
    intact: bool = True,
    repeatable: Callable[[str], bool] = lambda branch: True,
  ) -> Branch:
    """The branch on which training goes on from a checkpoint.

    Args:
      checkpoint_branch: branch of the checkpoint; empty for a fresh start.
      checkpoint_step: updates that the checkpoint contains.
      lineage: digest of what decides the gradients now.
      environment: what may change their rounding.
      state: digest of the arrays that a new branch would start from, which may
        hold settings (a learning rate, say) that no program shows.
      intact: whether these arrays are those that the checkpoint was made of.
      repeatable: whether all that updates of a branch were made of from here on
        is still there: teachers' weights.

    Returns:
      The checkpoint's own branch if continuing it repeats what it released or
      releases nothing twice; else a new one with fresh keys.

    Raises:
      LedgerError: the checkpoint's branch is not in the ledger.
    """
    branch = self._branches.get(checkpoint_branch)
    if checkpoint_branch and branch is None:
      raise LedgerError(
        f"{self.path} does not know branch {checkpoint_branch[:12]} of the"
        " checkpoint: they belong to different runs. Restore the ledger that"
        " was written with this checkpoint."
      )
    if (
      branch is None
      or branch.lineage != lineage
      or not self._repeats_exactly(branch.name, checkpoint_step, environment)
      or (
        self._has_begun(branch.name, checkpoint_step)
        and not (intact and repeatable(branch.name))
      )
    ):
      fork = checkpoint_branch, checkpoint_step, lineage, environment, state
      branch = self._fork(*fork, repeatable)
    if self._environments[branch.name][-1][1] != environment:
      self._append(
        {
          "kind": "environment",
          "branch": branch.name,
          "step": max(checkpoint_step, self.last_step(branch.name) + 1),
          "environment": environment,
        }
      )
    return branch

  def _fork(
    self,
    parent: str,
    step: int,
    lineage: str,
    environment: str,
    state: str,
    repeatable: Callable[[str], bool],
  ) -> Branch:
    # The same fork may have been made before and have gone on under another
    # rounding: then it cannot be repeated, and its next namesake is taken.
    for attempt in itertools.count():
      name = branches.name_of(
        parent, str(step), lineage, environment, state, str(attempt)
      )
      if name not in self._branches:
        branch = Branch(name, parent, step, lineage, environment)
        self._append({"kind": "branch", **branch._asdict()})
        return branch
      if self._repeats_exactly(name, step, environment) and (
        not self._has_begun(name, step) or repeatable(name)
      ):
        return self._branches[name]
    raise AssertionError("there is always a free name")

  def _has_begun(self, branch: str, step: int) -> bool:
    """Whether anything of `branch` from update `step` on is written down."""
    return self.last_step(branch) >= step or self.lessons.begins_at(
      branch, step
    )

  def _repeats_exactly(self, branch: str, step: int, environment: str) -> bool:
    return branches.repeats_exactly(
      self._environments[branch], self.last_step(branch), step, environment
    )

  def record(
    self,
    branch: str,
    step: int,
    release: accounting.Releases,
    round_number: int | None = None,
  ) -> None:
    """Writes down update `step` of `branch`; call it before the update.

    A replay of what is already written must release the same and adds nothing.

    Args:
      branch: its name.
      step: the update.
      release: what it would cost alone.
      round_number: `PrivacyPlan.round_number`: updates of one round of a branch
        are priced once, at the dearest; None: a round of its own.

    Raises:
      LedgerError: the replay differs, or a step is skipped.
      OSError: the line could not be written; do not make the update.
    """
    by_step = self._releases.get(branch, {})
    update = entries.Update(
      release, step if round_number is None else round_number
    )
    if step in by_step:
      if by_step[step] != update:
        raise LedgerError(
          f"update {step} of branch {branch[:12]} was released with"
          f" {by_step[step]} and would now be repeated with {update}."
        )
      return
    expected = self.last_step(branch) + 1
    expected = max(expected, self._branches[branch].fork_step)
    if step != expected:
      raise LedgerError(
        f"update {step} of branch {branch[:12]} cannot be recorded before"
        f" update {expected}."
      )
    entry = {"kind": "release", "branch": branch, "step": step}
    self._append({**entry, **update.as_dict(step)})

  def record_lesson(
    self, branch: str, step: int, lesson: teachers.Lesson
  ) -> None:
    """Writes down who teaches `branch` from update `step` on.

    Raises:
      LedgerError: the update was made already, or stands before the last
        lesson; the file is as before.
      OSError: the line could not be written; do not make the update.
    """
    try:
      self._check_lesson(branch, step)
    except ValueError as error:
      raise LedgerError(
        f"{self.path} takes no such lesson: {error}."
      ) from error
    told = {"kind": "lesson", "branch": branch, "step": step}
    self._append({**told, **lesson.as_dict()})

  def record_other(self, other: others_lib.OtherRelease) -> None:
    """Writes down, once, what was released beside the updates.

    Raises:
      OSError: the line could not be written.
    """
    if other not in self._others:
      self._append({"kind": "other", **other.as_dict()})

  def declare_unprotected(self, what: str) -> None:
    """Notes, once, that `what` was published without protection."""
    if what not in self._unprotected:
      self._append({"kind": "unprotected", "what": what})

  def declare_public(self, piece: others_lib.DeclaredPublic) -> None:
    """Notes, once, that `piece` entered the run as public."""
    if piece not in self._public:
      self._append({"kind": "public", **piece._asdict()})

  # --- the file ------------------------------------------------------------

  def attach(self, file: Any) -> None:
    """Writes into this open file from now on: see `opened`."""
    self._lines.attach(file)

  def _append(self, entry: Mapping[str, Any]) -> None:
    self._lines.append(entry)


@contextlib.contextmanager
def opened(directory: pathlib.Path) -> Iterator[Ledger]:
  """The ledger of MODEL_DIR, locked for the one process that trains there.

  Args:
    directory: MODEL_DIR, which must exist.

  Yields:
    A ledger that can be written.

  Raises:
    LedgerError: damaged, or another process is training in `directory`.
  """
  path = directory / LEDGER_FILE
  with open(path, "ab", buffering=0) as file:
    _keep_name(directory)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise LedgerError(
        f"another process is training in {directory}; wait for it or choose"
        " another MODEL_DIR."
      ) from error
    ledger = Ledger(path)
    ledger.attach(file)
    yield ledger


def read(directory: pathlib.Path) -> Ledger:
  """The ledger of MODEL_DIR, for reports.

  Raises:
    FileNotFoundError: there is none.
    LedgerError: it is damaged or empty, or lacks what a checkpoint knows.
  """
  path = directory / LEDGER_FILE
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: {directory} is not a MODEL_DIR of dptrain, or"
      f" its first training run has not begun.{runs_below(directory)}"
    )
  ledger = Ledger(path)
  if not ledger.header:
    raise LedgerError(f"{path} is empty: nothing was released yet.")
  ledger.check_checkpoints()
  return ledger


def runs_below(directory: pathlib.Path) -> str:
  """Where to look in a folder of several runs, for messages; else empty."""
  runs = sorted(path.parent for path in directory.glob(f"*/{LEDGER_FILE}"))
  if not runs:
    return ""
  shown = ", ".join(map(str, runs[:4]))
  return f" There are runs below it: name {shown}{' ...' * (len(runs) > 4)}."


def _keep_name(directory: pathlib.Path) -> None:
  """Makes the name of a new file in `directory` survive a power cut."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
