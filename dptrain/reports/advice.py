"""What to train on a budget: a paper's prediction, and dptrain's own price."""

from collections.abc import Sequence
import dataclasses
import json
import shlex
from typing import Any

from dptrain.privacy import accounting
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.reports import layout
from dptrain.reports import scaling_law

_CAVEAT = (
  "What arXiv 2501.18914 predicts for masked language models (BERT, 512 tokens"
  " per record, DP-Adam, delta 1e-8) trained from nothing on its corpus."
  " dptrain has measured none of it. Read off the 20 points of that paper's"
  " Table 2, linearly in logarithms between them; compute is 6 per parameter"
  " and token, without what clipping costs."
)


@dataclasses.dataclass(frozen=True)
class Advice:
  """A prediction, and what dptrain's accountants say of it.

  Attributes:
    prediction: the paper's.
    flops: compute that was asked about; None if none was.
    plan: `batch_size` records for each of `steps` updates, its noise calibrated
      to the records, epsilon and delta asked for.
    epsilon: of that plan.
    warnings: where prediction or plan is weak, in words.
  """

  prediction: scaling_law.Prediction
  flops: float | None
  plan: plan_lib.PrivacyPlan
  epsilon: accounting.Epsilon
  warnings: list[str]

  @property
  def steps(self) -> int:
    """Updates, to two digits."""
    return self.plan.num_steps

  @property
  def batch_size(self) -> int:
    """Records that an update expects, to two digits."""
    return self.plan.expected_batch_size(0)

  @property
  def noise_batch_ratio(self) -> float:
    """Of the noise on the mean of clipped gradients, over the sensitivity."""
    return self.plan.noise_multiplier / self.batch_size

  def as_dict(self) -> dict[str, Any]:
    """Plain data for JSON."""
    plan = self.plan
    return {
      "source": scaling_law.SOURCE,
      "prediction_is": _CAVEAT,
      "num_examples": plan.num_examples,
      "target_epsilon": plan.target_epsilon,
      "delta": plan.delta,
      "flops": self.flops,
      "predicted": dataclasses.asdict(self.prediction),
      "own": {
        "steps": self.steps,
        "expected_batch_size": self.batch_size,
        "sampling_prob": plan.sampling_prob(0),
        "noise_multiplier": plan.noise_multiplier,
        "noise_batch_ratio": self.noise_batch_ratio,
        "epsilon": self.epsilon.as_dict(),
      },
      "command": shlex.join(self.command()),
      "warnings": self.warnings,
    }

  def as_json(self) -> str:
    """The advice as JSON text."""
    return json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n"

  def as_text(self) -> str:
    """The advice as text for people, lines of at most 80 columns."""
    lines = [
      *layout.paragraph(_CAVEAT),
      "",
      *layout.table([*self.asked(), *self.predicted()]),
      "",
      "dptrain's own price of those updates",
      *layout.table(self.own()),
    ]
    if self.warnings:
      lines += ["", "Beware", *layout.bullets(self.warnings)]
    lines += ["", "To go on from here", *layout.typed(self.command())]
    return "\n".join(lines) + "\n"

  def caveat(self) -> str:
    """What the prediction is, and what it is not."""
    return _CAVEAT

  def asked(self) -> list[tuple[str, str]]:
    """The budget, as pairs of a name and a value."""
    rows = [
      ("records", f"{self.plan.num_examples:,}"),
      (
        "privacy budget",
        f"epsilon {self.plan.target_epsilon:g}, delta {self.plan.delta:g}",
      ),
    ]
    saturating = f"saturating is {self.prediction.saturating.flops:.2g} FLOPs"
    if self.flops is None:
      return [*rows, ("compute", f"not stated; {saturating}")]
    verdict = "enough" if self.prediction.saturates else "short of it"
    return [
      *rows,
      ("compute", f"{self.flops:.3g} FLOPs; {saturating}: {verdict}"),
    ]

  def predicted(self) -> list[tuple[str, str]]:
    """The paper's prediction, as pairs of a name and a value."""
    found = self.prediction
    best, tokens = found.advised, scaling_law.SEQUENCE_LENGTH
    nearest = min(
      scaling_law.MODELS.items(),
      key=lambda item: abs(item[1] / best.parameters - 1),
    )
    loss = f"{found.loss_at_least:.2f}"
    if found.loss_at_most > found.loss_at_least:
      loss = f"between {loss} and {found.loss_at_most:.2f}"
    seen = best.batch_size * best.steps
    return [
      (
        "model",
        f"{best.parameters:.2g} parameters (BERT {nearest[0]} has"
        f" {nearest[1]:.3g})",
      ),
      ("updates", f"{self.steps:,}"),
      ("expected batch", f"{self.batch_size:,}"),
      (
        "tokens per parameter",
        f"{tokens * seen / best.parameters:.2g}",
      ),
      (
        "compute of these",
        f"{scaling_law.flops(best.parameters, best.steps, best.batch_size):.2g}"
        " FLOPs",
      ),
      ("cross-entropy", f"{loss} on that corpus"),
    ]

  def own(self) -> list[tuple[str, str]]:
    """What dptrain's accountants say, as pairs of a name and a value."""
    plan, epsilon = self.plan, self.epsilon
    return [
      (
        "noise multiplier",
        f"{plan.noise_multiplier:g}: epsilon"
        f" {layout.rounded_up(epsilon.value)} ({epsilon.accountant},"
        f" {epsilon.settings}), Poisson sampling, {plan.relation}",
      ),
      ("sampling prob", f"{plan.sampling_prob(0):.4g}"),
      (
        "noise / batch",
        f"{self.noise_batch_ratio:.3g}: on the mean of the clipped gradients",
      ),
      (
        "epochs",
        f"{self.batch_size * self.steps / plan.num_examples:.3g}",
      ),
    ]

  def command(self) -> list[str]:
    """The forecast of the advised plan."""
    plan, best = self.plan, self.prediction.advised
    return [
      "dptrain",
      "plan",
      f"--num_examples={plan.num_examples}",
      f"--delta={plan.delta!r}",
      f"--epsilon={plan.target_epsilon!r}",
      f"--phase={self.batch_size}:{self.steps}",
      f"--num_parameters={best.parameters:.2g}",
      f"--sequence_length={scaling_law.SEQUENCE_LENGTH}",
    ]


def advise(
  num_examples: int,
  epsilon: float,
  *,
  delta: float | None = None,
  flops: float | None = None,
) -> Advice:
  """What to train on records, privacy budget and compute.

  Args:
    num_examples: records in the corpus.
    epsilon: the budget.
    delta: of the budget; None: the paper's, if it is below 1 / records.
    flops: compute; None: as much as saturates.

  Raises:
    ValueError: the budget is too far off the paper's, or delta is missing.
  """
  if delta is None:
    delta = scaling_law.DELTA
    if delta >= 1 / num_examples:
      raise ValueError(
        f"--delta is missing: the paper's, {delta:g}, is not below 1/N with"
        f" {num_examples:,} records; give one that is."
      )
  found = scaling_law.predict(num_examples, epsilon, flops)
  batch_size = min(_two_digits(found.advised.batch_size), num_examples)
  plan = plan_lib.make_plan(
    plan_lib.PrivacySettings(
      schedule=schedule.constant(batch_size, _two_digits(found.advised.steps)),
      delta=delta,
      target_epsilon=epsilon,
    ),
    num_examples,
  )
  ratio = plan.noise_multiplier / batch_size
  epochs = batch_size * plan.num_steps / num_examples
  return Advice(
    prediction=found,
    flops=flops,
    plan=plan,
    epsilon=accounting.epsilon(plan.releases(), delta, plan.relation),
    warnings=[*found.warnings, *_beyond(delta, ratio, epochs)],
  )


def _beyond(delta: float, ratio: float, epochs: float) -> Sequence[str]:
  told = []
  if epochs > 1:
    told.append(
      "The paper trained for less than one pass over its corpus. That"
      f" {epochs:.3g} passes over the same records are as good as fresh ones is"
      " an assumption (its appendix B.2)."
    )
  if not 0.1 <= delta / scaling_law.DELTA <= 10:
    told.append(
      f"The paper's points hold at delta {scaling_law.DELTA:g}; at {delta:g}"
      " the noise, and with it the loss, is another. dptrain's own price is for"
      " your delta."
    )
  least, most = scaling_law.NOISE_BATCH_RATIOS
  if not least <= ratio <= most:
    told.append(
      f"noise / batch {ratio:.2g} lies outside what the paper trained with,"
      f" {least:.2g} to {most:.2g}."
    )
  return told


def _two_digits(value: float) -> int:
  return max(1, int(float(f"{value:.2g}")))
