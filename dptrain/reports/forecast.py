"""What a plan would cost, before anything is spent.

What is priced are the plan's own releases, as the ledger's will be.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule as schedule_lib
from dptrain.reports import layout
from dptrain.reports import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCost:
  """What a model costs to train, apart from privacy.

  Attributes:
    num_parameters: of the model.
    sequence_length: tokens of one record.
    memory: bytes by what they hold, on one device without sharding.
  """

  num_parameters: int
  sequence_length: int
  memory: dict[str, int] = dataclasses.field(default_factory=dict)

  def flops(self, examples: float) -> float:
    """6 per parameter and token (arXiv 2001.08361); clipping is not in it."""
    return 6.0 * self.num_parameters * self.sequence_length * examples


@dataclasses.dataclass(frozen=True)
class PhaseForecast:
  """A run of updates of one size.

  Attributes:
    first_step: index of its first update.
    num_steps: how many updates.
    expected_batch_size: of each.
    sampling_prob: of each record in each update.
    noise_batch_ratio: standard deviation of the noise on the mean of clipped
      gradients, in units of the sensitivity (arXiv 2501.18914, section 3).
  """

  first_step: int
  num_steps: int
  expected_batch_size: int
  sampling_prob: float
  noise_batch_ratio: float


@dataclasses.dataclass(frozen=True)
class Alternative:
  """Another schedule of as many updates, at the same epsilon.

  Attributes:
    name: in words.
    noise_multiplier: what it takes; None if no noise is enough.
    noise_batch_ratio: of its last update; None likewise.
    examples: expected over all updates.
    epochs: the same, over the corpus.
    flops: None without a model.
  """

  name: str
  noise_multiplier: float | None
  noise_batch_ratio: float | None
  examples: int
  epochs: float
  flops: float | None


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a plan would cost.

  Attributes:
    plan: the plan, its noise decided.
    epsilon: of all its updates.
    epsilon_without_amplification: as if every update read every record.
    affordable_steps: updates that the budget allows; None without a budget.
    phases: the schedule.
    examples: expected over all updates.
    epochs: the same, over the corpus.
    model: what the model costs; None if unknown.
    alternatives: constant batches beside the plan, at equal epsilon.
    others: what else is released on the corpus; part of every epsilon.
  """

  plan: plan_lib.PrivacyPlan
  epsilon: accounting.Epsilon
  epsilon_without_amplification: float
  affordable_steps: int | None
  phases: list[PhaseForecast]
  examples: int
  epochs: float
  model: ModelCost | None
  alternatives: list[Alternative]
  others: tuple[others_lib.OtherRelease, ...] = ()

  def as_dict(self) -> dict[str, Any]:
    """Plain data for JSON."""
    unamplified = self.epsilon_without_amplification
    flops = self.model.flops(self.examples) if self.model else None
    return dataclasses.asdict(self) | {
      "plan": self.plan.as_dict(),
      "epsilon": self.epsilon.as_dict(),
      "others": [other.as_dict() for other in self.others],
      "epsilon_without_amplification": "inf"
      if unamplified == math.inf
      else unamplified,
      "flops": flops,
    }

  def as_json(self) -> str:
    """The forecast as JSON text."""
    return json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n"

  def as_text(self) -> str:
    """The forecast as text for people, lines of at most 80 columns."""
    facts = [f"{name:24}{value}" for name, value in self.facts()]
    lines = [*facts, "", *_phases(self.phases)]
    if self.alternatives:
      lines += ["", *_alternatives(self.alternatives)]
    return "\n".join(lines) + "\n"

  def facts(self) -> list[tuple[str, str]]:
    """Its figures, as pairs of a name and a value."""
    plan, epsilon = self.plan, self.epsilon
    estimated = ""
    if plan.relation == "add_or_remove_one":
      estimated = " (a public estimate)"
    rows = [
      (
        "epsilon",
        f"{layout.rounded_up(epsilon.value)} ({epsilon.accountant})",
      ),
      ("delta", f"{plan.delta:g}"),
      ("noise multiplier", f"{plan.noise_multiplier:g}"),
      ("records", f"{plan.num_examples:,}{estimated}"),
      ("updates", f"{plan.num_steps:,}"),
      ("examples", f"{self.examples:,} (expected), {self.epochs:.3g} epochs"),
      (
        "without amplification",
        f"epsilon {layout.rounded_up(self.epsilon_without_amplification)}",
      ),
    ]
    rows += _metrics(self)
    rows += [("vocabulary", "part of epsilon") for _ in self.others]
    if self.affordable_steps is not None:
      budget = f"epsilon {plan.target_epsilon:g}"
      rows.append(
        ("budget", f"{budget} allows {self.affordable_steps:,} updates")
      )
    if self.model is not None:
      rows.append(
        (
          "compute",
          f"{self.model.flops(self.examples):.3g} FLOPs"
          f" ({self.model.num_parameters:,} parameters)",
        )
      )
      rows += [
        (f"memory: {name}", f"{size / 2**20:,.0f} MiB")
        for name, size in self.model.memory.items()
      ]
    return rows


def forecast(
  plan: plan_lib.PrivacyPlan,
  *,
  model: ModelCost | None = None,
  constant_batches: Sequence[int] = (),
  others: Sequence[others_lib.OtherRelease] = (),
) -> Forecast:
  """Prices a plan and, beside it, constant batches at the same epsilon.

  Args:
    plan: from `plan.make_plan`.
    model: for compute and memory.
    constant_batches: expected batch sizes to compare with, at most N each.
    others: what else is released on the corpus, at the same delta.

  Returns:
    The forecast.

  Raises:
    ValueError: a batch to compare with exceeds the corpus.
  """
  paid = others_lib.releases(others)
  left = others_lib.delta_left(others, plan.delta)
  releases = [*paid, *plan.releases()]
  epsilon = accounting.epsilon(releases, left, plan.relation)
  affordable = None
  if plan.target_epsilon is not None:
    affordable = accounting.affordable_steps(
      lambda n: [*paid, *plan.releases(0, n)],
      plan.num_steps,
      plan.target_epsilon,
      left,
      plan.relation,
    )
  segments = plan.schedule.segments()
  examples = sum(s.num_steps * s.expected_batch_size for s in segments)
  alternatives = []
  if constant_batches:
    alternatives = [
      Alternative(
        "this plan",
        plan.noise_multiplier,
        plan.noise_multiplier / segments[-1].expected_batch_size,
        examples,
        examples / plan.num_examples,
        model.flops(examples) if model else None,
      ),
      *(
        _constant(plan, size, epsilon.value, model, others)
        for size in constant_batches
      ),
    ]
  return Forecast(
    plan=plan,
    epsilon=epsilon,
    epsilon_without_amplification=accounting.epsilon_without_amplification(
      releases, left, plan.relation
    ),
    affordable_steps=affordable,
    phases=[
      PhaseForecast(
        s.first_step,
        s.num_steps,
        s.expected_batch_size,
        plan.sampling_prob(s.first_step),
        plan.noise_multiplier / s.expected_batch_size,
      )
      for s in segments
    ],
    examples=examples,
    epochs=examples / plan.num_examples,
    model=model,
    alternatives=alternatives,
    others=tuple(others),
  )


def parse_phase(text: str) -> schedule_lib.Phase:
  """Reads a phase off the command line.

  >>> parse_phase("1e6:20000")
  Phase(start_size=1000000, end_size=1000000, until_step=20000, ramp='linear')
  >>> parse_phase("256:1024:30").end_size
  1024

  Args:
    text: SIZE:UNTIL for a constant size, START:END:UNTIL for a ramp; both end
      before update UNTIL.

  Raises:
    ValueError: neither form.
  """
  try:
    numbers = [float(part) for part in text.split(":")]
  except ValueError:
    numbers = []
  if len(numbers) not in (2, 3) or any(n != int(n) for n in numbers):
    raise ValueError(
      f"--phase={text} is no phase: write SIZE:UNTIL or START:END:UNTIL, such"
      " as 262144:1048576:7500."
    )
  start, end, until = numbers if len(numbers) == 3 else (numbers[0], *numbers)
  return schedule_lib.Phase(int(start), int(end), int(until))


def _constant(
  plan: plan_lib.PrivacyPlan,
  size: int,
  budget: float,
  model: ModelCost | None,
  others: Sequence[others_lib.OtherRelease],
) -> Alternative:
  if not 1 <= size <= plan.num_examples:
    raise ValueError(
      f"--compare has {size}, which is not within 1 and the"
      f" {plan.num_examples:,} examples of the corpus."
    )
  steps = plan.num_steps
  constant = schedule_lib.constant(size, steps)
  examples = size * steps
  try:
    noise = calibration.noise_multiplier(
      lambda noise: [
        *others_lib.releases(others),
        *dataclasses.replace(
          plan, schedule=constant, noise_multiplier=noise
        ).releases(),
      ],
      budget,
      others_lib.delta_left(others, plan.delta),
      plan.relation,
    )
  except ValueError:
    noise = None
  return Alternative(
    f"constant {size:,}",
    noise,
    None if noise is None else noise / size,
    examples,
    examples / plan.num_examples,
    model.flops(examples) if model else None,
  )


def _metrics(made: Forecast) -> list[tuple[str, str]]:
  told = report.private_metrics(made.plan.as_dict())
  if not told["released"]:
    return []
  sizes = sorted({phase.expected_batch_size for phase in made.phases})
  ends = [sizes[0], sizes[-1]] if len(sizes) > 1 else sizes
  noise = " to ".join(f"{told['sum_noise_stddev'] / size:.2g}" for size in ends)
  share = f"{100 * told['budget_share']:g} % of the budget"
  return [("private metrics", f"{share}; noise on accuracy {noise}")]


def _phases(phases: Sequence[PhaseForecast]) -> list[str]:
  lines = [
    "  from update   updates   expected batch   sampling prob   noise / batch"
  ]
  return lines + [
    f"  {p.first_step:11,d}   {p.num_steps:7,d}   {p.expected_batch_size:14,d}"
    f"   {p.sampling_prob:13.4g}   {p.noise_batch_ratio:13.4g}"
    for p in phases
  ]


def _alternatives(rows: Sequence[Alternative]) -> list[str]:
  lines = [
    "At equal epsilon and as many updates",
    "  schedule              noise   noise / batch       epochs        FLOPs",
  ]
  for row in rows:
    noise = (
      "     none fits               "
      if row.noise_multiplier is None or row.noise_batch_ratio is None
      else f"{row.noise_multiplier:10.4f}   {row.noise_batch_ratio:13.4g}"
    )
    flops = "" if row.flops is None else f"{row.flops:10.3g}"
    lines.append(f"  {row.name:18}{noise}   {row.epochs:10.3g}   {flops}")
  return lines
