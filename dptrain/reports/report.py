"""The privacy report: what is protected, how well, and what is not.

Everything in it is computed from the ledger alone.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import rounds
from dptrain.reports import layout
from dptrain.reports import taught as taught_lib
from dptrain.reports import wording

TEXT_FILE = "privacy_report.txt"
JSON_FILE = "privacy_report.json"

_PUBLIC_NUMBER = "The number of {}s is treated as public."
# True of every run, whatever its configuration.
_ALWAYS_UNPROTECTED = (
  "Text that occurs in several records is protected once per record, not as a"
  " whole.",
  "Choices made by looking at results on this corpus (hyper-parameters, when to"
  " stop) are not priced.",
  "Other runs on the same records, copies of MODEL_DIR that were trained on,"
  " and the choice of where to fork: each costs privacy that this report does"
  " not add.",
  "Time: how long updates take tells about how many records they drew.",
  "The secret seed in MODEL_DIR: whoever has it can subtract the noise. Never"
  " publish it.",
  "Noise is drawn in float32 by a counter-based generator with 64-bit keys:"
  " attacks on floating-point rounding or on the generator are not covered.",
)


@dataclasses.dataclass(frozen=True)
class PrivacyReport:
  """A privacy statement for one MODEL_DIR.

  Attributes:
    claim: whether a guarantee is claimed at all (not under a fixed seed).
    plan: the plan, as recorded.
    clip_norm: whether the clip norm adapts, and how that is paid for.
    private_metrics: whether training metrics are released, and the same.
    unit: the privacy unit in words.
    relation: the neighbouring relation in words.
    delta: of the guarantee.
    epsilon: the bound for everything released, with its accountant; where the
      run learned from others, for what they had released, too.
    taught: who taught it, and at what price; None if nobody did.
    epsilon_without_amplification: for comparison, every update priced as if it
      had read every record.
    others: what was released beside the updates; priced with them.
    num_releases: updates released, over all branches.
    num_rounds: rounds of updates that they are priced by (`rounds`).
    branches: per branch: name, parent, fork step, updates.
    schedule: runs of equal releases: count, sampling_prob, noise_multiplier.
    public: what entered the run as public: what, and its fingerprint.
    unprotected: what the guarantee does not cover.
    versions: of the packages that computed this.
  """

  claim: bool
  plan: dict[str, Any]
  clip_norm: dict[str, Any]
  private_metrics: dict[str, Any]
  unit: str
  relation: str
  delta: float
  epsilon: accounting.Epsilon
  epsilon_without_amplification: float
  others: list[dict[str, Any]]
  num_releases: int
  num_rounds: int
  branches: list[dict[str, Any]]
  schedule: list[dict[str, Any]]
  public: list[dict[str, str]]
  unprotected: list[str]
  versions: dict[str, str]
  taught: taught_lib.Taught | None = None

  def as_json(self) -> str:
    """The report as JSON text."""
    data = dataclasses.asdict(self) | {"epsilon": self.epsilon.as_dict()}
    data["taught"] = None if self.taught is None else self.taught.as_dict()
    if self.epsilon_without_amplification == math.inf:
      data["epsilon_without_amplification"] = "inf"  # JSON has no infinity
    return json.dumps(data, indent=2, sort_keys=True) + "\n"

  def as_text(self) -> str:
    """The report as text for people, lines of at most 80 columns."""
    return "\n".join(
      [
        "Privacy report",
        "==============",
        "",
        *layout.paragraph(self.statement()),
        "",
        *layout.table(self.facts()),
        "",
        "Released, over all branches",
        *self._released(),
        "",
        *wording.declared_public(self.public),
        "Not protected",
        *layout.bullets(self.unprotected),
        "",
        "Computed from the ledger by "
        + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        "",
      ]
    )

  def statement(self) -> str:
    """The guarantee in a few sentences."""
    if wording.EXACT_CODEBOOKS in self.unprotected:
      # Such a run has a fixed seed, which its reader must not have to guess.
      fixed = "" if self.claim else " The seed is fixed, too."
      return (
        "NO PRIVACY CLAIM: the N-Grammer's codebooks follow exact means of"
        f" private batches, which no epsilon covers.{fixed} The figures below"
        " are of everything else, under a secret seed."
      )
    if not self.claim:
      return (
        "FIXED SEED: NO PRIVACY CLAIM. The noise of this run can be recomputed"
        " by anyone. The figures below are what the same run with a secret seed"
        " would claim."
      )
    metrics = ""
    if self.private_metrics["released"]:
      metrics = " the private metrics,"
    if self.others:
      metrics += " the vocabulary,"
    teachers = ""
    if self.taught is not None:
      teachers = ", and all weights of other runs that they learned from,"
    return (
      f"The trained parameters,{metrics} and every checkpoint of every branch"
      f"{teachers or ','} together are"
      f" ({layout.rounded_up(self.epsilon.value)}, {self.delta})-differentially"
      " private."
      f" Protected is {self.unit}."
    )

  def facts(self) -> list[tuple[str, str]]:
    """Its terms, as pairs of a name and a value."""
    eps, plan = self.epsilon, self.plan
    rdp = layout.rounded_up(eps.rdp) if eps.rdp is not None else "none"
    pld = layout.rounded_up(eps.pld) if eps.pld is not None else eps.note
    unamplified = layout.rounded_up(self.epsilon_without_amplification)
    return [
      ("privacy unit", self.unit),
      ("neighbouring corpora", self.relation),
      (
        "epsilon",
        f"{layout.rounded_up(eps.value)} ({eps.accountant}, {eps.settings})",
      ),
      *(self.taught.facts() if self.taught is not None else ()),
      ("delta", f"{self.delta}"),
      ("epsilon by RDP / PLD", f"{rdp} / {pld}"),
      (
        "without amplification",
        f"{unamplified} ({self._unamplified()})",
      ),
      ("budget", self._budget()),
      (
        f"{wording.sampled(plan)}s",
        f"{plan['num_examples']:,}{self._estimated()}",
      ),
      (
        "sampling",
        wording.SAMPLING_TEXT[plan["sampling"]].replace(
          "record", wording.sampled(plan)
        ),
      ),
      ("clipping", self._clipping()),
      ("noise multiplier", f"{plan['noise_multiplier']:g}{self._banded()}"),
      *self._metrics(),
      *[("vocabulary", self._other(other)) for other in self.others],
    ]

  def _budget(self) -> str:
    budget = self.plan["target_epsilon"]
    if budget is None:
      return "none"
    own = "" if self.taught is None else ", for this run's own releases"
    return f"epsilon {budget:g}{own}"

  def _other(self, other: dict[str, Any]) -> str:
    return (
      f"{other['what']}: its price is part of epsilon, and"
      f" {other['failure_prob']:.3g} of delta pays for the choice of its words"
    )

  def _metrics(self) -> list[tuple[str, str]]:
    told = self.private_metrics
    if not told["released"]:
      return []
    ranges = told["ranges"]
    names = ", ".join(name.replace("_", " ") for name in ranges)
    return [
      (
        "private metrics",
        f"{names}: noisy means over the examples of each update, part of the"
        f" release and priced with it. {100 * told['budget_share']:g} % of each"
        " update's budget (of 1 / noise multiplier squared) pays for them; the"
        " gradients' own noise multiplier is"
        f" {told['gradient_noise_multiplier']:.4g}. Losses count up to"
        f" {ranges['loss']:g}, gradients' norms up to"
        f" {ranges['gradient_norm']:g} times the clip norm",
      )
    ]

  def _unamplified(self) -> str:
    own = "" if self.taught is None else "this run's own releases: "
    return f"{own}{self._unamplified_how()}"

  def _unamplified_how(self) -> str:
    if self.plan["sampling"] in rounds.UNAMPLIFIED:
      return "the same: none is claimed for this sampling"
    if self.num_rounds != self.num_releases:
      return f"as if every round had read every {wording.sampled(self.plan)}"
    return f"as if every update had read every {wording.sampled(self.plan)}"

  def _estimated(self) -> str:
    private = self.plan["relation"] == "add_or_remove_one"
    return " (a public estimate)" if private else ""

  def _banded(self) -> str:
    bands = self.plan.get("bands", 1)
    if bands == 1:
      return ""
    return f"; noise of {bands} updates in a row is correlated (BandMF)"

  def _clipping(self) -> str:
    plan, norm = self.plan, self.clip_norm
    if plan["clipping"] == "automatic":
      return f"automatic, gamma {plan['automatic_gamma']:g}"
    told = f"{plan['clipping']}, l2_clip_norm {plan['l2_clip_norm']:g}"
    if not norm["adapts"]:
      return told
    return (
      f"{told} at first. It adapts to the {norm['target_quantile']:g} quantile"
      " of the gradients' norms, by a noisy count at each update. Its values"
      " are part of the release and are priced with it:"
      f" {100 * norm['budget_share']:g} % of each update's budget (of 1 / noise"
      " multiplier squared) pays for the count; the gradients' own noise"
      f" multiplier is {norm['gradient_noise_multiplier']:.4g}"
    )

  def _released(self) -> list[str]:
    lines = [
      "  updates   sampling probability   expected batch   noise multiplier"
    ]
    if self.num_rounds != self.num_releases:
      lines = [
        f"  Priced by rounds of updates: {self.num_rounds} of them.",
        "   rounds   sampling probability                    noise multiplier",
      ]
    for row in self.schedule:
      size = f"{row['sampling_prob'] * self.plan['num_examples']:14,.0f}"
      if self.num_rounds != self.num_releases:
        size = " " * 14
      lines.append(
        f"  {row['count']:7d}   {row['sampling_prob']:20.6g}   {size}  "
        f" {row['noise_multiplier']:16.6g}"
      )
    lines.append(f"  {self.num_releases} updates in all")
    if len(self.branches) > 1:
      lines.append(f"  {len(self.branches)} branches, all priced:")
    for row in self.branches if len(self.branches) > 1 else ():
      parent = row["parent"][:12] or "the start"
      lines.append(
        f"    {row['name'][:12]} from {parent} after update {row['fork_step']}:"
        f" {row['updates']} updates"
      )
    return lines


def make_report(ledger: ledger_lib.Ledger) -> PrivacyReport:
  """Computes the report of a ledger.

  Raises:
    LedgerError: the ledger has no header.
  """
  if not ledger.header:
    raise ledger_lib.LedgerError(
      f"{ledger.path} has no plan: nothing to report."
    )
  plan = ledger.header["plan"]
  releases, updates = ledger.releases(), ledger.update_releases()
  left = ledger.delta_left(plan["delta"])
  alone = accounting.epsilon(releases, left, plan["relation"])
  taught = taught_lib.taught(ledger, plan["delta"], plan["relation"])
  return PrivacyReport(
    claim=not ledger.fixed_seed,
    plan=plan,
    clip_norm=_clip_norm(plan),
    private_metrics=private_metrics(plan),
    unit=wording.unit(plan),
    relation=wording.RELATION_TEXT[plan["relation"]],
    delta=plan["delta"],
    epsilon=alone if taught is None else taught.epsilon,
    epsilon_without_amplification=accounting.epsilon_without_amplification(
      releases, left, plan["relation"]
    ),
    others=[other.as_dict() for other in ledger.others],
    num_releases=sum(
      ledger.num_releases(branch.name) for branch in ledger.branches
    ),
    num_rounds=sum(release.count for release in updates),
    branches=[
      {
        "name": branch.name,
        "parent": branch.parent,
        "fork_step": branch.fork_step,
        "updates": ledger.num_releases(branch.name),
      }
      for branch in ledger.branches
    ],
    schedule=[dataclasses.asdict(release) for release in updates],
    public=[piece._asdict() for piece in ledger.public],
    unprotected=[
      *ledger.unprotected,
      *([] if taught is None else taught.unprotected),
      *(
        []
        if plan["relation"] == "add_or_remove_one"
        else [_PUBLIC_NUMBER.format(wording.sampled(plan))]
      ),
      *_ALWAYS_UNPROTECTED,
    ],
    versions=versions(),
    taught=taught,
  )


def _clip_norm(plan: dict[str, Any]) -> dict[str, Any]:
  """What the JSON says of the clip norm.

  The multipliers are those of the parts of one release (arXiv 1905.03871);
  together they cost what the plan's multiplier costs.
  """
  if plan.get("adaptive_quantile") is None:
    return {"adapts": False}
  share = plan["adaptive_budget_share"]
  return {
    "adapts": True,
    "values_are_released": True,
    "target_quantile": plan["adaptive_quantile"],
    "learning_rate": plan["adaptive_learning_rate"],
    "budget_share": share,
    "gradient_noise_multiplier": _gradient_noise_multiplier(plan),
    "count_noise_multiplier": plan["noise_multiplier"] / math.sqrt(share),
  }


def private_metrics(plan: dict[str, Any]) -> dict[str, Any]:
  """What the JSON says of private metrics, with multipliers as `_clip_norm`'s.

  Args:
    plan: as plain data.

  Returns:
    "released", and if so the rest. Each sum of values that are scaled by their
    range has noise of standard deviation "sum_noise_stddev".
  """
  ranges = plan_lib.metric_ranges(plan)
  if not ranges:
    return {"released": False}
  share = plan["private_metrics_share"]
  multiplier = plan["noise_multiplier"] / math.sqrt(share)
  return {
    "released": True,
    "ranges": ranges,
    "budget_share": share,
    "gradient_noise_multiplier": _gradient_noise_multiplier(plan),
    "metrics_noise_multiplier": multiplier,
    "sum_noise_stddev": multiplier * math.sqrt(len(ranges)) / 2.0,
  }


def _gradient_noise_multiplier(plan: dict[str, Any]) -> float:
  """What is left to the gradients of one release."""
  shares = 0.0
  if plan.get("adaptive_quantile") is not None:
    shares += plan["adaptive_budget_share"]
  shares += plan.get("private_metrics_share") or 0.0
  return float(plan["noise_multiplier"] / math.sqrt(1.0 - shares))


def write_report(ledger: ledger_lib.Ledger, directory: pathlib.Path) -> None:
  """Writes the report beside the checkpoints, as text and as JSON."""
  report = make_report(ledger)
  stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  for name, text in (
    (TEXT_FILE, f"{report.as_text()}Written {stamp}\n"),
    (JSON_FILE, report.as_json()),
  ):
    draft = directory / f".{name}.draft"
    draft.write_text(text, encoding="utf-8")
    draft.replace(directory / name)


def versions() -> dict[str, str]:
  """Of the packages that compute epsilon."""
  return {
    name: importlib.metadata.version(name)
    for name in ("dptrain", "dp-accounting")
  }
