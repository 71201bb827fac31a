"""The privacy report as one self-contained page, for browser and printer."""

from collections.abc import Callable, Sequence
import dataclasses
import html
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import mechanisms
from dptrain.privacy import others as others_lib
from dptrain.reports import curves
from dptrain.reports import layout
from dptrain.reports import page
from dptrain.reports import released_metrics
from dptrain.reports import report as report_lib
from dptrain.reports import wording

_MAX_POINTS = 40  # of a learning curve: means of more updates have less noise
_UNITS = {"gradient_norm": " / clip norm"}


def make_page(
  ledger: ledger_lib.Ledger,
  metrics: Sequence[released_metrics.Release] = (),
) -> str:
  """The page of a ledger, as HTML; it loads nothing from anywhere.

  Takes some seconds: what the curves show is computed anew.

  Args:
    ledger: of one MODEL_DIR.
    metrics: what `released_metrics.read` found there; drawn if the ledger
      prices it.

  Raises:
    LedgerError: the ledger has no header.
  """
  made = report_lib.make_report(ledger)
  releases = _in_order(ledger)
  relation = made.plan["relation"]
  parts = [
    page.claim(made.statement()),
    page.terms(made.facts()),
  ]
  # Of a run that learned from others they would show its own releases alone:
  # whoever tests for a unit has seen the others', too, and a group may have
  # units in several runs.
  if releases and made.epsilon.pld is not None and made.taught is None:
    parts += _figures(made, ledger, releases)
    # Of a group, one record's updates may border on another's, and a word
    # that all of them hold is no longer one unit's.
    alone = made.plan.get("bands", 1) == 1 and not ledger.others
    if alone and curves.prices_groups(releases, relation):
      parts.append(_groups(made, releases, relation))
  parts += _learning(released_metrics.of_last_branch(ledger, metrics))
  parts += [
    "<h2>What was released</h2>",
    _released(made),
    *_public(made),
    "<h2>What is not protected</h2>",
    page.bullets(made.unprotected),
    "<h2>How to check this</h2>",
    _checking(made),
  ]
  return page.document("Privacy report", parts)


def _in_order(ledger: ledger_lib.Ledger) -> list[accounting.Releases]:
  """Runs of equal releases, branch after branch, in the order of rounds."""
  found: list[accounting.Releases] = []
  for release in ledger.releases_in_order():
    if found and dataclasses.replace(found[-1], count=1) == release:
      found[-1] = dataclasses.replace(found[-1], count=found[-1].count + 1)
    else:
      found.append(release)
  return found


def _figures(
  made: report_lib.PrivacyReport,
  ledger: ledger_lib.Ledger,
  releases: list[accounting.Releases],
) -> list[str]:
  relation = made.plan["relation"]
  others = others_lib.releases(ledger.others)
  growth = curves.growth(
    releases, ledger.delta_left(made.delta), relation, others
  )
  trade = curves.trade_off(
    [*others, *releases],
    made.epsilon.value,
    made.delta,
    relation,
    failure_prob=others_lib.failure_prob(ledger.others),
  )

  by_rounds = made.num_rounds != made.num_releases
  unit_of_time = "rounds" if by_rounds else "updates"

  def spent(axes: Any) -> None:
    axes.plot(growth.updates, growth.by_pld, label="PLD")
    if growth.by_rdp:
      axes.plot(growth.updates, growth.by_rdp, "--", label="RDP")
    axes.set(xlabel=unit_of_time, ylabel="epsilon", ylim=0)
    axes.legend(frameon=False)

  def unamplified(axes: Any) -> None:
    axes.plot(growth.updates, growth.by_pld, label="with sampling")
    axes.plot(growth.updates, growth.unamplified, ":", label="without")
    axes.set(xlabel=unit_of_time, ylabel="epsilon", yscale="log")
    axes.legend(frameon=False)

  def schedule(axes: Any) -> None:
    size, done = made.plan["num_examples"], 0
    steps, batches = [], []
    for release in releases:
      steps += [done, done + release.count]
      batches += [release.sampling_prob * size] * 2
      done += release.count
    axes.plot(steps, batches)
    axes.set(xlabel="updates", ylabel="expected batch", ylim=0)

  def deltas(axes: Any) -> None:
    axes.plot(trade.epsilons, trade.deltas)
    axes.plot([made.epsilon.value], [made.delta], "o")
    axes.set(xlabel="epsilon", ylabel="delta", yscale="log")

  def errors(axes: Any) -> None:
    axes.plot(trade.type_1, trade.type_2)
    axes.plot([0, 1], [1, 0], ":", color="grey")
    axes.set(xlabel="false alarms", ylabel="misses", xlim=(0, 1), ylim=(0, 1))

  drawn = (
    (spent, f"Epsilon at delta {made.delta:g}, as it was spent."),
    (unamplified, "The same, and as if each of them had read every record."),
    (schedule, "Records that an update expects."),
    (deltas, "Every delta has its epsilon; the dot is the one quoted."),
    (
      errors,
      "Whoever tests whether one record was in the corpus must miss it at least"
      " this often, for each rate of false alarms; dotted: pure guessing.",
    ),
  )
  shown = list(drawn)
  if by_rounds:
    # What is priced are rounds, of several updates each.
    shown = [pair for pair in drawn if pair[0] is not schedule]
  return ["<h2>Behind the number</h2>", page.plots(shown)]


def _learning(metrics: Sequence[released_metrics.Release]) -> list[str]:
  """Curves of the private metrics; nothing without them."""
  if len(metrics) < 2:
    return []
  length = -(-len(metrics) // _MAX_POINTS)
  windows = [
    metrics[start : start + length] for start in range(0, len(metrics), length)
  ]
  ends = [window[-1].step + 1 for window in windows]
  means = [released_metrics.mean(window) for window in windows]

  def curve(name: str) -> Callable[[Any], None]:
    values = [mean.values[name] for mean in means]
    band = [2 * mean.noise[name] for mean in means]

    def draw(axes: Any) -> None:
      pairs = list(zip(values, band, strict=True))
      axes.fill_between(
        ends, [v - b for v, b in pairs], [v + b for v, b in pairs], alpha=0.25
      )
      axes.plot(ends, values)
      label = name.replace("_", " ") + _UNITS.get(name, "")
      axes.set(xlabel="updates", ylabel=label)

    return draw

  point = "one update" if length == 1 else f"the mean of {length:,} updates"
  return [
    "<h2>Learning curve</h2>",
    "<p>Training metrics as they were released, with noise that the epsilon"
    f" above pays for. A point is {point}, the band two standard deviations of"
    " the noise; which records an update draws adds to that.</p>",
    page.plots([(curve(name), "") for name in metrics[0].values]),
  ]


def _groups(
  made: report_lib.PrivacyReport,
  releases: list[accounting.Releases],
  relation: str,
) -> str:
  found = curves.group_epsilons(releases, made.delta, relation)
  limit = f"over {accounting.MAX_EPSILON_FOR_PLD:g}"
  rows = [
    [
      f"{size} {wording.sampled(made.plan)}s",
      limit if value is None else layout.rounded_up(value),
    ]
    for size, value in found.items()
  ]
  return (
    "<h2>Groups</h2><p>Several records of one source (a person, a document) are"
    f" protected less. Epsilon at the same delta, {made.delta:g}, for groups"
    " that change together:</p>"
    + page.columns(["group", "epsilon"], rows, numeric={1})
  )


def _released(made: report_lib.PrivacyReport) -> str:
  size = made.plan["num_examples"]
  by_rounds = made.num_rounds != made.num_releases
  names = [
    "rounds" if by_rounds else "updates",
    "sampling probability",
    "expected batch",
    "noise",
  ]
  rows = [
    [
      f"{row['count']:,}",
      f"{row['sampling_prob']:.6g}",
      f"{row['sampling_prob'] * size:,.0f}",
      f"{row['noise_multiplier']:.6g}",
    ]
    for row in made.schedule
  ]
  if by_rounds:  # of updates, whose batches they do not tell
    del names[2]
    rows = [[row[0], row[1], row[3]] for row in rows]
  branches = ""
  if len(made.branches) > 1:
    branches = f"<p>{len(made.branches)} branches, all priced.</p>"
  return page.columns(names, rows, numeric=set(range(len(names)))) + branches


def _public(made: report_lib.PrivacyReport) -> list[str]:
  if not made.public:
    return []
  told = [
    f"{piece['what']}: SHA-256 {piece['fingerprint'][:16]}…"
    for piece in made.public
  ]
  return ["<h2>What was declared public</h2>", page.bullets(told)]


def _checking(made: report_lib.PrivacyReport) -> str:
  versions = ", ".join(f"{k} {v}" for k, v in made.versions.items())
  named = mechanisms.RELATIONS[made.plan["relation"]].name
  # As recorded: rounds of the other samplings are priced as Poisson releases.
  kinds = {row["sampling"]: _EVENTS[row["sampling"]] for row in made.schedule}
  events = " or ".join(f"<code>{html.escape(e)}</code>" for e in kinds.values())
  return (
    "<p>Everything above follows from <code>privacy_ledger.jsonl</code>"
    " alone: <code>dptrain report MODEL_DIR --format html</code> makes this"
    " page again, <code>--format json</code> gives the figures. Each line of"
    " the ledger holds one update's sampling and noise multiplier, the round"
    " that it belongs to if it shares one, and the hash of the line before it."
    f" To recompute epsilon without dptrain, compose for each row of the table"
    f" {events} that many times{_others(made)} with dp_accounting's"
    f" <code>{_BY[made.epsilon.accountant]}</code>"
    f" ({html.escape(made.epsilon.settings)}) under"
    f" <code>NeighboringRelation.{named}</code>.</p>"
    f'<p class="small">Computed by {html.escape(versions)}.</p>'
  )


def _others(made: report_lib.PrivacyReport) -> str:
  told = "".join(
    f", <code>GaussianDpEvent({other['noise_multiplier']:.6g})</code> once"
    for other in made.others
  )
  failing = sum(other["failure_prob"] for other in made.others)
  if not told:
    return ""
  return f"{told}, all at delta {made.delta:g} less {failing:g},"


_BY = {
  "PLD": "PLDAccountant",
  "RDP": "RdpAccountant",
  "Gaussian": "get_epsilon_gaussian",
}
# What a row of the table is to dp_accounting.
_EVENTS = {
  "poisson": (
    "PoissonSampledDpEvent(sampling probability, GaussianDpEvent(noise))"
  ),
  "truncated_poisson": (
    "TruncatedSubsampledGaussianDpEvent(records, sampling probability,"
    " truncated_batch_size, noise)"
  ),
  "without_replacement": (
    "SampledWithoutReplacementDpEvent(records, expected batch,"
    " GaussianDpEvent(noise / 2))"
  ),
}
