"""The plan: one object that sampler, noise, accountant and ledger all read.

`PrivacySettings` is what a user binds in gin; `make_plan` joins it with the
corpus into a `PrivacyPlan`. Nothing else in dptrain holds a sampling
probability, an expected batch size or a noise multiplier.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any
import warnings

from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import schedule as schedule_lib

METRICS = ("loss", "accuracy", "clip_fraction", "gradient_norm")
CLIPPING_RULES = ("flat", "normalized", "automatic")
_SMALLEST_NORM = 1e-10  # as `clipping.rules.SMALLEST_NORM`


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacySettings:
  """What a user decides about privacy.

  Attributes:
    schedule: expected batch size by update.
    delta: of (epsilon, delta)-DP; below 1/N, or a warning says so.
    noise_multiplier: noise standard deviation over sensitivity. None: the
      smallest that keeps the whole schedule within `target_epsilon`.
    target_epsilon: the budget; training stops before the update that would
      exceed it. None: no budget, and `noise_multiplier` must be given.
    l2_clip_norm: bound C on the L2 norm of one unit's whole gradient.
    clipping: "flat" (to norm at most C), "normalized" (flat, then divided by
      C) or "automatic" (g / (|g| + gamma), arXiv 2206.07136).
    automatic_gamma: the gamma of automatic clipping.
    adaptive_quantile: None to clip to `l2_clip_norm` throughout; else the share
      of gradients that shall be no longer than C, which then starts at
      `l2_clip_norm` and moves after every update (arXiv 1905.03871).
    adaptive_learning_rate: how fast log C moves.
    adaptive_budget_share: part of each update's budget (of 1 / noise^2) that
      pays for the noisy tally which C follows; the rest is the gradients'.
    private_metrics_share: None to release no training metrics; else the part of
      each update's budget that pays for noisy means of the examples' loss,
      accuracy, clip fraction (not with automatic clipping) and gradient norm.
    private_metrics_max_loss: losses count up to it; the noise on the mean is
      proportional to it. Somewhat above the log of the vocabulary's size.
    private_metrics_max_norm: the same of gradients' norms, in units of C.
    relation: neighbouring relation, "zero_out": the number of records is
      public. Adding or removing a record would change it, and with it the
      sampling probabilities.
    sampling: "poisson", the only one so far.
    unit: the privacy unit, "record" (one fixed-length sequence).
  """

  schedule: schedule_lib.BatchSchedule
  delta: float
  noise_multiplier: float | None = None
  target_epsilon: float | None = None
  l2_clip_norm: float = 1.0
  clipping: str = "flat"
  automatic_gamma: float = 0.01
  adaptive_quantile: float | None = None
  adaptive_learning_rate: float = 0.2
  adaptive_budget_share: float = 0.01
  private_metrics_share: float | None = None
  private_metrics_max_loss: float = 12.0
  private_metrics_max_norm: float = 10.0
  relation: str = "zero_out"
  sampling: str = "poisson"
  unit: str = "record"

  def __post_init__(self) -> None:
    accounting.check_delta(self.delta)
    if self.noise_multiplier is None and self.target_epsilon is None:
      raise ValueError(
        "PrivacySettings.noise_multiplier and target_epsilon are both None:"
        " give a noise multiplier, a budget, or both."
      )
    for name in (
      "noise_multiplier",
      "target_epsilon",
      "l2_clip_norm",
      "automatic_gamma",
      "private_metrics_max_loss",
      "private_metrics_max_norm",
    ):
      value = getattr(self, name)
      if value is not None and not 0 < value < float("inf"):
        raise ValueError(
          f"PrivacySettings.{name}={value} must be a positive, finite number."
        )
    for name in ("l2_clip_norm", "automatic_gamma"):
      if getattr(self, name) < _SMALLEST_NORM:
        raise ValueError(
          f"PrivacySettings.{name}={getattr(self, name)} is below"
          f" {_SMALLEST_NORM}, where float32 norms of gradients are no longer"
          " true; scale the loss up instead."
        )
    self._check_adaptation()
    self._check_shares()
    for name, known in (
      ("clipping", CLIPPING_RULES),
      ("relation", ("zero_out",)),
      ("sampling", ("poisson",)),
      ("unit", ("record",)),
    ):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
          f"PrivacySettings.{name}={value!r} is not supported; use one of"
          f" {', '.join(map(repr, known))}."
        )

  def _check_adaptation(self) -> None:
    if not 0 < self.adaptive_learning_rate < float("inf"):
      raise ValueError(
        f"PrivacySettings.adaptive_learning_rate={self.adaptive_learning_rate}"
        " must be a positive, finite number."
      )
    if self.adaptive_quantile is not None and self.clipping == "automatic":
      raise ValueError(
        f"PrivacySettings.adaptive_quantile={self.adaptive_quantile} needs a"
        " clip norm to adapt, which clipping='automatic' lacks; use 'flat' or"
        " 'normalized', or adaptive_quantile=None."
      )

  def _check_shares(self) -> None:
    for name in (
      "adaptive_quantile",
      "adaptive_budget_share",
      "private_metrics_share",
    ):
      value = getattr(self, name)
      if value is not None and not 0 < value < 1:
        raise ValueError(
          f"PrivacySettings.{name}={value} must be between 0 and 1."
        )
    if self.adaptive_quantile is None or self.private_metrics_share is None:
      return
    if self.adaptive_budget_share + self.private_metrics_share >= 1:
      raise ValueError(
        f"PrivacySettings.adaptive_budget_share={self.adaptive_budget_share}"
        f" and private_metrics_share={self.private_metrics_share} leave nothing"
        " of an update's budget to the gradients: choose shares whose sum is"
        " below 1."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
  """What a run will release, update by update; every field is public.

  Formal guarantee: unit: one record of the training store. Relation "zero_out":
  neighbouring corpora have the same public size N and differ in one record,
  which one of them replaces by a record that contributes nothing
  (REPLACE_SPECIAL of dp-accounting, arXiv 2103.00039). Sensitivity: that of the
  clipping rule. With `adaptive_quantile` or `private_metrics_share`, sum, tally
  and metrics are one release of `noise_multiplier` (`clipping.shares`).
  Sampling probabilities, expected_batch_size / num_examples, are constants of
  the plan.

  Attributes: those of `PrivacySettings`, with `noise_multiplier` decided, the
    ranges of private metrics None if none are released, and
    num_examples: corpus size N.
  """

  num_examples: int
  schedule: schedule_lib.BatchSchedule
  noise_multiplier: float
  delta: float
  target_epsilon: float | None
  l2_clip_norm: float
  clipping: str
  automatic_gamma: float
  adaptive_quantile: float | None
  adaptive_learning_rate: float
  adaptive_budget_share: float
  private_metrics_share: float | None
  private_metrics_max_loss: float | None
  private_metrics_max_norm: float | None
  relation: str
  sampling: str
  unit: str

  @property
  def num_steps(self) -> int:
    """Updates in the whole run."""
    return self.schedule.num_steps

  def sampling_prob(self, step: int) -> float:
    """Probability that a given example takes part in update `step`."""
    return self.expected_batch_size(step) / self.num_examples

  def expected_batch_size(self, step: int) -> int:
    """The public constant that the noisy sum of update `step` is divided by."""
    return self.schedule.expected_batch_size(step)

  def release(self, step: int) -> accounting.Releases:
    """What update `step` releases."""
    return accounting.Releases(
      1, self.sampling_prob(step), self.noise_multiplier
    )

  def releases(self, first_step: int = 0) -> Iterator[accounting.Releases]:
    """Runs of equal releases from update `first_step` to the end, in order."""
    for start, count, size in self.schedule.segments():
      count = start + count - max(start, first_step)
      if count > 0:
        yield accounting.Releases(
          count, size / self.num_examples, self.noise_multiplier
        )

  def as_dict(self) -> dict[str, Any]:
    """Plain data: what the ledger records and a resumed run must equal."""
    return dataclasses.asdict(self)


def make_plan(
  settings: PrivacySettings,
  num_examples: int,
  *,
  calibrated_noise: float | None = None,
) -> PrivacyPlan:
  """Joins settings and corpus size; calibrates the noise if it is not given.

  Args:
    settings: the user's decisions.
    num_examples: records in the training store.
    calibrated_noise: what an earlier start of the same run was calibrated to;
      read only if `settings` gives no noise multiplier.

  Returns:
    The plan of the whole run.

  Raises:
    ValueError: a phase expects more examples than there are, or no noise
      reaches the target epsilon.
  """
  if num_examples < 1:
    raise ValueError(f"num_examples={num_examples}: the corpus is empty.")
  segments = settings.schedule.segments()
  largest = max(segments, key=lambda segment: segment.expected_batch_size)
  if largest.expected_batch_size > num_examples:
    raise ValueError(
      f"expected_batch_size={largest.expected_batch_size} from update"
      f" {largest.first_step} on exceeds the corpus of {num_examples} examples:"
      " its sampling probability would be over 1. Lower that phase of"
      " BatchSchedule or bring more text."
    )
  if settings.delta >= 1 / num_examples:
    warnings.warn(
      f"delta={settings.delta:g} is not below 1/N={1 / num_examples:.3g}: such"
      " a delta allows publishing whole records. Choose a smaller delta.",
      stacklevel=2,
    )
  noise_multiplier = settings.noise_multiplier or calibrated_noise
  if noise_multiplier is None:
    if settings.target_epsilon is None:
      raise ValueError("give noise_multiplier or target_epsilon.")
    noise_multiplier = calibration.noise_multiplier(
      [(s.num_steps, s.expected_batch_size / num_examples) for s in segments],
      settings.target_epsilon,
      settings.delta,
      settings.relation,
    )
  fields = {
    field.name: getattr(settings, field.name)
    for field in dataclasses.fields(settings)
  }
  fields["noise_multiplier"] = float(noise_multiplier)
  if settings.private_metrics_share is None:
    fields["private_metrics_max_loss"] = None
    fields["private_metrics_max_norm"] = None
  return PrivacyPlan(num_examples=num_examples, **fields)


def metric_ranges(plan: Mapping[str, Any]) -> dict[str, float]:
  """The largest value of each private metric; empty if none is released.

  Args:
    plan: as plain data; one of an older dptrain may lack fields.
  """
  if plan.get("private_metrics_share") is None:
    return {}
  largest = {
    "loss": plan["private_metrics_max_loss"],
    "gradient_norm": plan["private_metrics_max_norm"],
  }
  found = {name: largest.get(name, 1.0) for name in METRICS}
  if plan["clipping"] == "automatic":
    del found["clip_fraction"]  # it has no clip norm
  return found


def differences(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
  """Names each field in which two plans (as plain data) differ."""
  return [
    f"{name} was {recorded.get(name)!r} and is now {current.get(name)!r}"
    for name in sorted({*recorded, *current})
    if recorded.get(name) != current.get(name)
  ]
