"""The privacy report: what is protected, how well, and what is not.

Everything in it is computed from the ledger alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import decimal
import importlib.metadata
import json
import math
import pathlib
import shlex
import textwrap
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import rounds

TEXT_FILE = "privacy_report.txt"
JSON_FILE = "privacy_report.json"

UNITS = {
  "record": "one record: one fixed-length token sequence of the corpus",
  "document": "one document",
  "user": "one user: everything of theirs in the corpus",
}
RELATION_TEXT = {
  "zero_out": (
    "zero-out: two corpora of the same public size that differ in one unit,"
    " which one of them replaces by a unit that contributes nothing"
  ),
  "replace_one": (
    "replace-one: two corpora of the same public size that differ in one unit"
  ),
  "add_or_remove_one": (
    "add-or-remove-one: two corpora, one of which has one unit more; how many"
    " there are is private"
  ),
}
SAMPLING_TEXT = {
  "poisson": "poisson: each record independently, at each update",
  "truncated_poisson": (
    "truncated poisson: each record independently, at each update; a sample"
    " beyond the limit is cut to it at random, which is priced"
  ),
  "without_replacement": (
    "without replacement: a uniformly random set of a fixed size, at each"
    " update"
  ),
  "shuffled": (
    "shuffled: passes over all records in random order, priced without"
    " amplification: a record takes part once in each round (pass)"
  ),
  "balls_in_bins": (
    "balls in bins: each record in one of several bins, at random, which take"
    " turns; priced without amplification: a record takes part once in each"
    " round"
  ),
  "cyclic_poisson": (
    "cyclic poisson: groups of records take turns, at random within the group;"
    " a record takes part at most once in each round"
  ),
}
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
    epsilon: the bound for everything released, with its accountant.
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

  def as_json(self) -> str:
    """The report as JSON text."""
    data = dataclasses.asdict(self) | {"epsilon": self.epsilon.as_dict()}
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
        *paragraph(self.statement()),
        "",
        *table(self.facts()),
        "",
        "Released, over all branches",
        *self._released(),
        "",
        *declared_public(self.public),
        "Not protected",
        *bullets(self.unprotected),
        "",
        "Computed from the ledger by "
        + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        "",
      ]
    )

  def statement(self) -> str:
    """The guarantee in a few sentences."""
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
    return (
      f"The trained parameters,{metrics} and every checkpoint of every branch,"
      f" together are ({rounded_up(self.epsilon.value)},"
      f" {self.delta})-differentially"
      " private."
      f" Protected is {self.unit}."
    )

  def facts(self) -> list[tuple[str, str]]:
    """Its terms, as pairs of a name and a value."""
    eps, plan = self.epsilon, self.plan
    budget = plan["target_epsilon"]
    rdp = rounded_up(eps.rdp) if eps.rdp is not None else "none"
    pld = rounded_up(eps.pld) if eps.pld is not None else eps.note
    unamplified = rounded_up(self.epsilon_without_amplification)
    return [
      ("privacy unit", self.unit),
      ("neighbouring corpora", self.relation),
      (
        "epsilon",
        f"{rounded_up(eps.value)} ({eps.accountant}, {eps.settings})",
      ),
      ("delta", f"{self.delta}"),
      ("epsilon by RDP / PLD", f"{rdp} / {pld}"),
      (
        "without amplification",
        f"{unamplified} ({self._unamplified()})",
      ),
      ("budget", "none" if budget is None else f"epsilon {budget:g}"),
      (
        f"{sampled(plan)}s",
        f"{plan['num_examples']:,}{self._estimated()}",
      ),
      (
        "sampling",
        SAMPLING_TEXT[plan["sampling"]].replace("record", sampled(plan)),
      ),
      ("clipping", self._clipping()),
      ("noise multiplier", f"{plan['noise_multiplier']:g}{self._banded()}"),
      *self._metrics(),
      *[("vocabulary", self._other(other)) for other in self.others],
    ]

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
    if self.plan["sampling"] in rounds.UNAMPLIFIED:
      return "the same: none is claimed for this sampling"
    if self.num_rounds != self.num_releases:
      return f"as if every round had read every {sampled(self.plan)}"
    return f"as if every update had read every {sampled(self.plan)}"

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
  return PrivacyReport(
    claim=not ledger.fixed_seed,
    plan=plan,
    clip_norm=_clip_norm(plan),
    private_metrics=private_metrics(plan),
    unit=_unit(plan),
    relation=RELATION_TEXT[plan["relation"]],
    delta=plan["delta"],
    epsilon=accounting.epsilon(releases, left, plan["relation"]),
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
      *(
        []
        if plan["relation"] == "add_or_remove_one"
        else [_PUBLIC_NUMBER.format(sampled(plan))]
      ),
      *_ALWAYS_UNPROTECTED,
    ],
    versions=versions(),
  )


def declared_public(pieces: Sequence[Mapping[str, str]]) -> list[str]:
  """Lines about what entered a run as public; none if there is nothing."""
  if not pieces:
    return []
  told = [f"{piece['what']}: {piece['fingerprint'][:16]}" for piece in pieces]
  return ["Declared public (taken on trust; fingerprints)", *bullets(told), ""]


def sampled(plan: Mapping[str, Any]) -> str:
  """What an update samples, and counts, in a word."""
  by_record = plan.get("unit_sampling", "units") == "records"
  return "record" if by_record else str(plan["unit"])


def _unit(plan: dict[str, Any]) -> str:
  """The privacy unit in words."""
  named = plan.get("unit_name") or UNITS[plan["unit"]]
  if plan["unit"] == "record":
    return named
  k = plan["records_per_unit"]
  told = f"{named} (of which at most {k} records of fixed length take part"
  if plan["unit_sampling"] == "units":
    return f"{told}, as one example)"
  return f"{told}, each sampled on its own; groups of {k} are priced)"


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


def rounded_up(bound: float) -> str:
  """Four digits, never below `bound`: less would claim too much."""
  context = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)
  return f"{float(context.create_decimal_from_float(bound)):.4g}"


def paragraph(text: str) -> list[str]:
  """Lines of at most 80 columns."""
  return textwrap.wrap(text, 80)


def bullets(texts: list[str]) -> list[str]:
  """Each text with a dash in front, wrapped."""
  return [
    line
    for text in texts
    for line in textwrap.wrap(
      text, 78, initial_indent="  - ", subsequent_indent="    "
    )
  ]


def table(rows: list[tuple[str, str]]) -> list[str]:
  """Names and values in two columns, wrapped."""
  width = max(len(name) for name, _ in rows) + 2
  return [
    line
    for name, value in rows
    for line in textwrap.wrap(
      value,
      80,
      initial_indent=f"{name:{width}}",
      subsequent_indent=" " * width,
    )
  ]


def typed(command: Sequence[str]) -> list[str]:
  """A command in lines of at most 80 columns that a shell takes as one."""
  lines = [""]
  for word in command:
    word = shlex.quote(word)
    if lines[-1] and len(lines[-1]) + len(word) > 77:
      lines.append("   ")
    lines[-1] += f" {word}" if lines[-1] else word
  return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
