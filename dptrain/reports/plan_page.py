"""The forecast of a plan as one self-contained page."""

from collections.abc import Callable, Sequence
import html
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import others as others_lib
from dptrain.reports import curves
from dptrain.reports import forecast as forecast_lib
from dptrain.reports import layout
from dptrain.reports import page
from dptrain.reports import report
from dptrain.reports import wording

_Draw = tuple[Callable[[Any], None], str]

_ALWAYS_ASSUMED = (
  "Each update adds up the clipped gradients of the records it drew, adds"
  " Gaussian noise once, with the stated noise multiplier times the sensitivity"
  " as its standard deviation, and divides by the expected batch, a constant.",
  "Schedule, sampling probabilities and noise multiplier are public; none was"
  " chosen by looking at the records.",
  "Every update runs as planned and every checkpoint may be published. A crash"
  " that is replayed costs nothing; another run on the same records, or a"
  " continuation that differs, is not in the figure and costs its own.",
  "The seed is secret, and nothing else that was computed from the records (a"
  " vocabulary, metrics that are not priced) is published, or its loss is"
  " accepted.",
)

# From here on, dots are told apart better on a logarithmic axis.
_WIDE_RANGE = 20


def make_page(made: forecast_lib.Forecast, *, command: Sequence[str]) -> str:
  """The page of a forecast, as HTML; it loads nothing from anywhere.

  Takes some seconds: epsilon over the updates is computed anew.

  Args:
    made: the forecast.
    command: what makes the page again, word by word.
  """
  parts = [page.claim(_claim(made)), page.terms(made.facts())]
  parts += [
    "<h2>Over the updates</h2>",
    page.plots([*_growth(made), *_schedule(made)]),
    "<h2>Phases</h2>",
    _phases(made),
  ]
  if made.alternatives:
    parts += ["<h2>At equal epsilon</h2>", *_alternatives(made)]
  parts += [
    "<h2>What is assumed</h2>",
    page.bullets(_assumptions(made)),
    "<h2>How to make this again</h2>",
    _again(made, command),
  ]
  return page.document("Privacy plan", parts)


def _claim(made: forecast_lib.Forecast) -> str:
  plan = made.plan
  told = (
    f"A plan, not a run. All {plan.num_steps:,} updates together would be"
    f" ({layout.rounded_up(made.epsilon.value)}, {plan.delta:g})-differentially"
    f" private. Protected would be {wording.UNITS[plan.unit]}."
  )
  steps = made.affordable_steps
  if steps is not None and steps < plan.num_steps:
    told += (
      f" The budget, epsilon {plan.target_epsilon:g}, ends after update"
      f" {steps:,}: training would stop there."
    )
  return told


def _growth(made: forecast_lib.Forecast) -> list[_Draw]:
  plan = made.plan
  if made.epsilon.pld is None:
    return []
  releases = plan.releases()
  growth = curves.growth(
    releases,
    others_lib.delta_left(made.others, plan.delta),
    plan.relation,
    others_lib.releases(made.others),
  )
  single = sum(r.count for r in releases) == plan.num_steps
  time = "updates" if single else "rounds"

  def spent(axes: Any) -> None:
    axes.plot(growth.updates, growth.by_pld, label="PLD")
    if growth.by_rdp:
      axes.plot(growth.updates, growth.by_rdp, "--", label="RDP")
    if plan.target_epsilon is not None:
      axes.axhline(plan.target_epsilon, color="grey", ls=":", label="budget")
    axes.set(xlabel=time, ylabel="epsilon", xlim=0, ylim=0)
    axes.legend(frameon=False)

  def unamplified(axes: Any) -> None:
    axes.plot(growth.updates, growth.by_pld, label="with sampling")
    axes.plot(growth.updates, growth.unamplified, ":", label="without")
    axes.set(xlabel=time, ylabel="epsilon", yscale="log", xlim=0)
    axes.legend(frameon=False)

  return [
    (
      spent,
      f"Epsilon at delta {plan.delta:g} after so many {time}.",
    ),
    (unamplified, "The same, and as if every update read every record."),
  ]


def _schedule(made: forecast_lib.Forecast) -> list[_Draw]:
  steps, batches, ratios = [], [], []
  for phase in made.phases:
    steps += [phase.first_step, phase.first_step + phase.num_steps]
    batches += [phase.expected_batch_size] * 2
    ratios += [phase.noise_batch_ratio] * 2
  # Within its group, under some samplings, a record is drawn more often.
  first = made.phases[0]
  size = first.expected_batch_size / first.sampling_prob

  def batch(axes: Any) -> None:
    axes.plot(steps, batches)
    axes.set(xlabel="updates", ylabel="expected batch", xlim=0, ylim=0)
    axes.secondary_yaxis(
      "right", functions=(lambda b: b / size, lambda q: q * size)
    ).set_ylabel("sampling probability")

  def ratio(axes: Any) -> None:
    axes.plot(steps, ratios)
    axes.set(xlabel="updates", ylabel="noise / batch", xlim=0, ylim=0)

  return [
    (batch, "Records that an update expects, and the probability of each."),
    (
      ratio,
      "Noise on the mean of the clipped gradients: its standard deviation in"
      " units of the sensitivity.",
    ),
  ]


def _phases(made: forecast_lib.Forecast) -> str:
  names = ["from update", "updates", "batch", "sampling prob", "noise / batch"]
  rows = [
    [
      f"{p.first_step:,}",
      f"{p.num_steps:,}",
      f"{p.expected_batch_size:,}",
      f"{p.sampling_prob:.4g}",
      f"{p.noise_batch_ratio:.4g}",
    ]
    for p in made.phases
  ]
  return page.long_columns(names, rows, range(len(names)))


def _alternatives(made: forecast_lib.Forecast) -> list[str]:
  fitting = [row for row in made.alternatives if row.noise_batch_ratio]
  names = [row.name for row in fitting]

  def noise(axes: Any) -> None:
    ratios = [row.noise_batch_ratio for row in fitting]
    _dots(axes, names, ratios, "noise / batch", "C0")

  def epochs(axes: Any) -> None:
    _dots(axes, names, [row.epochs for row in fitting], "epochs", "C1")

  rows = [
    [
      row.name,
      "none fits"
      if row.noise_multiplier is None
      else f"{row.noise_multiplier:.4f}",
      "" if row.noise_batch_ratio is None else f"{row.noise_batch_ratio:.4g}",
      f"{row.epochs:.3g}",
      "" if row.flops is None else f"{row.flops:.3g}",
    ]
    for row in made.alternatives
  ]
  heads = ["schedule", "noise multiplier", "noise / batch", "epochs", "FLOPs"]
  return [
    "<p>Constant batches for as many updates, at the plan's epsilon: less noise"
    " on the mean costs more examples.</p>",
    page.columns(heads, rows, range(1, len(heads))),
    page.plots(
      [
        (noise, "Noise on the mean of clipped gradients, at the last update."),
        (epochs, "What it costs: passes over the corpus, expected."),
      ]
    ),
  ]


def _dots(
  axes: Any, names: list[str], values: list[Any], label: str, color: str
) -> None:
  axes.plot(values, names, "o", color=color)
  if max(values) > _WIDE_RANGE * min(values):
    axes.set(xscale="log")
    axes.xaxis.set_minor_formatter("")
  else:
    axes.set(xlim=(0, 1.08 * max(values)))
    axes.locator_params(axis="x", nbins=5)
  axes.set(xlabel=label)
  axes.invert_yaxis()
  axes.grid(axis="y", color="#ddd")


def _assumptions(made: forecast_lib.Forecast) -> list[str]:
  plan = made.plan
  assumed = [
    f"Neighbouring corpora: {wording.RELATION_TEXT[plan.relation]}.",
    f"Sampling, {wording.SAMPLING_TEXT[plan.sampling]}.",
    *_ALWAYS_ASSUMED,
  ]
  assumed += [
    f"In every figure: {other.what}, as one release more, with"
    f" {other.failure_prob:.3g} of delta for the choice of its words."
    for other in made.others
  ]
  if plan.bands > 1:
    assumed.append(
      f"Noise is correlated over {plan.bands} updates (BandMF, arXiv"
      " 2306.08153), which are priced as one round."
    )
  if plan.adaptive_quantile is not None:
    assumed.append(
      "The clip norm adapts; the noisy count that it follows is part of each"
      " update's release and in the figure."
    )
  if made.model is not None:
    assumed.append(
      "FLOPs are 6 per parameter and token, without what clipping costs;"
      " memory, where it is told, is one device's without sharding, activations"
      " not counted."
    )
  return assumed


def _others(made: forecast_lib.Forecast) -> str:
  return ", ".join(
    f"<code>GaussianDpEvent({other.noise_multiplier:.6g})</code>"
    for other in made.others
  )


def _again(made: forecast_lib.Forecast, command: Sequence[str]) -> str:
  plan, epsilon = made.plan, made.epsilon
  typed = "\n".join(layout.typed(command))
  how = f"{epsilon.accountant}, {epsilon.settings}"
  versions = ", ".join(f"{k} {v}" for k, v in report.versions().items())
  bounds = [
    f"by {name} {layout.rounded_up(bound)}"
    for name, bound in (("RDP", epsilon.rdp), ("PLD", epsilon.pld))
    if bound is not None
  ]
  bounds += [epsilon.note] if epsilon.note else []
  composed = (
    " To recompute epsilon without dptrain, compose for each phase of the table"
    " <code>PoissonSampledDpEvent(sampling prob, GaussianDpEvent(noise"
    " multiplier))</code> as many times as it has updates, with dp_accounting's"
    " <code>PLDAccountant</code> or <code>RdpAccountant</code> under"
    f" <code>NeighboringRelation.{accounting.RELATIONS[plan.relation].name}"
    "</code>."
  )
  if made.others:
    composed += (
      f" Add {_others(made)}, and ask at delta"
      f" {others_lib.delta_left(made.others, plan.delta):.6g}."
    )
  return (
    f"<pre>{html.escape(typed)}</pre>"
    "<p>The same with <code>--format json</code> gives the figures."
    f"{composed if plan.sampling == 'poisson' else ''}"
    " A run of this plan writes the same releases into its ledger, and its"
    " report quotes the same epsilon.</p>"
    f'<p class="small">Epsilon by {html.escape(how)}:'
    f" {html.escape('; '.join(bounds))}. Computed by"
    f" {html.escape(versions)}.</p>"
  )
