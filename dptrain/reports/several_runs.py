"""One guarantee for several runs: restarts, trials, replicas on shards."""

from collections.abc import Mapping
import dataclasses
import json
import math
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import teachers
from dptrain.reports import layout
from dptrain.reports import report as report_lib
from dptrain.reports import taught
from dptrain.reports import wording


@dataclasses.dataclass(frozen=True)
class JointReport:
  """What several runs have released together.

  Attributes:
    claim: whether all runs had a secret seed.
    disjoint: whether their corpora share no unit.
    composed_by: how, in words.
    unit: the privacy unit in words.
    relation: the neighbouring relation in words.
    delta: the largest of the runs'.
    epsilon: of everything that any of them released.
    runs: epsilon of each alone at that delta, by name.
    public: what entered any of them as public.
    unprotected: what no run protects, and what one of them does not.
  """

  claim: bool
  disjoint: bool
  composed_by: str
  unit: str
  relation: str
  delta: float
  epsilon: float
  runs: dict[str, float]
  public: list[dict[str, str]]
  unprotected: list[str]

  def as_json(self) -> str:
    """The report as JSON text."""
    data = dataclasses.asdict(self)
    data["epsilon"] = _plain(self.epsilon)
    data["runs"] = {name: _plain(value) for name, value in self.runs.items()}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"

  def as_text(self) -> str:
    """The report as text for people."""
    facts = [
      ("privacy unit", self.unit),
      ("neighbouring corpora", self.relation),
      ("composed by", self.composed_by),
      ("delta", f"{self.delta}"),
      *(
        (name, f"epsilon {layout.rounded_up(value)} alone")
        for name, value in self.runs.items()
      ),
    ]
    return "\n".join(
      [
        "Privacy report of several runs",
        "==============================",
        "",
        *layout.paragraph(self._statement()),
        "",
        *layout.table(facts),
        "",
        *wording.declared_public(self.public),
        "Not protected",
        *layout.bullets(self.unprotected),
        "",
      ]
    )

  def _statement(self) -> str:
    bound = f"({layout.rounded_up(self.epsilon)}, {self.delta})"
    if any(wording.EXACT_CODEBOOKS in told for told in self.unprotected):
      return (
        "NO PRIVACY CLAIM: the N-Grammer's codebooks of at least one run follow"
        " exact means of private batches, which no epsilon covers."
      )
    if not self.claim:
      return (
        "FIXED SEED: NO PRIVACY CLAIM. The noise of at least one run can be"
        f" recomputed by anyone. With secret seeds the runs would be {bound}-"
        "differentially private."
      )
    return (
      "The parameters and checkpoints of all these runs together are"
      f" {bound}-differentially private. Protected is {self.unit}."
    )


def make_joint_report(
  ledgers: Mapping[str, ledger_lib.Ledger], *, disjoint: bool = False
) -> JointReport:
  """Composes the ledgers of several runs.

  Formal guarantee: that of `teachers.composed_epsilon`. Runs that learned from
  others bring what those had released. On one corpus, the releases of all runs
  are one sequence, adaptively chosen. On disjoint corpora a unit is in one of
  them at most, and the others are the same for both neighbours: the dearest
  bounds them all. Shards of one corpus are known to be disjoint by their
  ledgers; that other corpora are disjoint, or the same, is taken on trust.

  Args:
    ledgers: at least one, by name.
    disjoint: the corpora share no unit, though no ledger tells.

  Returns:
    The report.

  Raises:
    LedgerError: a ledger has no header, or the runs do not fit together.
  """
  reports = {
    name: report_lib.make_report(ledger) for name, ledger in ledgers.items()
  }
  sources = _sources(ledgers, disjoint)
  apart = "" not in teachers.by_part(sources)
  learned = any(ledger.lessons.all() for ledger in ledgers.values())
  # Runs that learned from each other may have been given what corpora they had.
  _check_alike(reports, apart or learned)
  _check_no_copies(ledgers)
  if disjoint and not apart:
    raise ledger_lib.LedgerError(
      "--disjoint, but by their ledgers these runs may have read the same units"
      " (Codistillation.corpora='overlapping', or shards of different"
      " divisions): report them without it."
    )
  some = next(iter(reports.values()))
  relation = some.plan["relation"]
  delta = max(report.delta for report in reports.values())
  alone = {
    name: accounting.epsilon(
      ledger.releases(), ledger.delta_left(delta), relation
    ).value
    for name, ledger in ledgers.items()
  }
  told = [text for report in reports.values() for text in report.unprotected]
  pieces = [piece for ledger in ledgers.values() for piece in ledger.public]
  return JointReport(
    claim=all(report.claim for report in reports.values()),
    disjoint=apart,
    composed_by=taught.composed_by(sources),
    unit=some.unit,
    relation=some.relation,
    delta=delta,
    epsilon=teachers.composed_epsilon(sources, delta, relation).value,
    runs=alone,
    public=[piece._asdict() for piece in dict.fromkeys(pieces)],
    unprotected=list(dict.fromkeys(told)),
  )


def _sources(
  ledgers: Mapping[str, ledger_lib.Ledger], disjoint: bool
) -> tuple[teachers.Source, ...]:
  """All runs, and those that they learned from, each once."""
  found: list[teachers.Source] = []
  for number, ledger in enumerate(ledgers.values()):
    part = teachers.shard_part(ledger.header.get("shard"))
    if not part and disjoint:
      part = teachers.declared_part("--disjoint", number)
    found += ledger.sources(part)
  return teachers.newest(found)


def _check_alike(
  reports: Mapping[str, report_lib.PrivacyReport], disjoint: bool
) -> None:
  """Raises LedgerError unless one statement can cover all runs."""
  (first, some), *others = reports.items()
  names = ["unit", "relation"] if disjoint else ["unit", "relation", "N"]
  for name, report in others:
    for field in names:
      key = "num_examples" if field == "N" else field
      here, there = report.plan[key], some.plan[key]
      if here != there:
        way_out = (
          "; corpora of different sizes are not the same: if no unit is in two"
          " of them, say --disjoint; else report them one by one"
          if field == "N"
          else "; report them one by one"
        )
        raise ledger_lib.LedgerError(
          f"{name} and {first} cannot be composed: {key} is {here!r} in one and"
          f" {there!r} in the other{way_out}."
        )


def _check_no_copies(ledgers: Mapping[str, ledger_lib.Ledger]) -> None:
  """Raises LedgerError if two runs share a seed, and maybe their noise."""
  by_seed: dict[str, str] = {}
  for name, ledger in ledgers.items():
    before = by_seed.setdefault(ledger.header["seed"], name)
    if before != name:
      raise ledger_lib.LedgerError(
        f"{name} and {before} are copies of one MODEL_DIR, or share their"
        " secret seed: their noise may be the same, and no composition covers"
        " that. Report only runs that started in a MODEL_DIR of their own."
      )


def _plain(value: float) -> Any:
  return "inf" if value == math.inf else value
