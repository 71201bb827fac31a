"""The plan: one object that sampler, noise, accountant and ledger all read.

`PrivacySettings` is what a user binds in gin; `make_plan` joins it with the
corpus into a `PrivacyPlan`. Nothing else in dptrain holds a sampling
probability, an expected batch size or a noise multiplier.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any
import warnings

import numpy as np

from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import correlated_noise
from dptrain.privacy import others as others_lib
from dptrain.privacy import rounds
from dptrain.privacy import schedule as schedule_lib
from dptrain.privacy import settings as settings_lib

METRICS = ("loss", "accuracy", "clip_fraction", "gradient_norm")

PrivacySettings = settings_lib.PrivacySettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
  """What a run will release, update by update; every field is public.

  Formal guarantee: unit: one record of the training store; or one document or
  user, of which at most `records_per_unit` records take part: then what is
  sampled and clipped as one example is the unit (`data.units.UnitStore`), or,
  with `unit_sampling` "records", single records, and groups of that size are
  priced (`mechanisms.group_event`). "Record" below is the unit. Neighbouring,
  by `relation`: under "zero_out" corpora have the same public size N and differ
  in one record, which one of them replaces by a record that contributes nothing
  (REPLACE_SPECIAL of dp-accounting, arXiv 2103.00039); under "replace_one", by
  any other; under "add_or_remove_one" N is private, and `num_examples` a public
  estimate of it. Sensitivity: that of the clipping rule, as the most that one
  record adds. With `adaptive_quantile` or `private_metrics_share`, sum, tally
  and metrics are one release of `noise_multiplier` (`clipping.shares`).
  Sampling probabilities and sizes are constants of the plan.

  With `bands` over 1, noise is correlated as C^-1 z for a banded Toeplitz C
  whose columns have norm 1, and a record takes part in every `bands`-th update
  at most. So its columns of C are orthogonal, and a round of `bands` updates
  costs what one update does at the largest of their sampling probabilities
  (arXiv 2306.08153, theorem 4).

  Attributes: those of `PrivacySettings`, with `noise_multiplier` decided, the
    ranges of private metrics None if none are released, and
    num_examples: corpus size N, or the public estimate of it.
    noise_coefficients: of `correlated_noise.BandedNoise`; None if independent.
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
  truncation_deviations: float
  bands: int
  public_num_examples: int | None
  unit: str
  records_per_unit: int
  unit_sampling: str
  unit_name: str | None
  noise_coefficients: tuple[float, ...] | None = None

  @property
  def num_steps(self) -> int:
    """Updates in the whole run."""
    return self.schedule.num_steps

  @property
  def amplified(self) -> bool:
    """Whether sampling lowers the price."""
    return self.sampling not in rounds.UNAMPLIFIED

  @property
  def group_size(self) -> int:
    """Examples of one unit that are sampled on their own."""
    return self.records_per_unit if self.unit_sampling == "records" else 1

  def sampling_prob(self, step: int) -> float:
    """Probability that an example which may take part in `step` does so."""
    return self._sampling_prob(self.expected_batch_size(step))

  def expected_batch_size(self, step: int) -> int:
    """The public constant that the noisy sum of update `step` is divided by."""
    return self.schedule.expected_batch_size(step)

  def participation_prob(self, step: int) -> float:
    """Probability that a given example takes part in update `step`."""
    size = self.expected_batch_size(step)
    if self.sampling == "balls_in_bins":
      return 1.0 / rounds.num_bins(size, self.num_examples)
    return size / self.num_examples

  def truncated_batch_size(self, step: int) -> int:
    """The most records of update `step`, under "truncated_poisson"."""
    return self._truncated(self.expected_batch_size(step))

  def sizes(self, start: int = 0) -> tuple[int, ...]:
    """Expected batch sizes from update `start` to the end."""
    return tuple(_sizes(self.schedule)[start:].tolist())

  def round_number(self, step: int, start: int = 0) -> int:
    """Number of the first update of the round of `step` (see `rounds`).

    Args:
      step: an update of a branch.
      start: the branch's first update.
    """
    if not rounds.several_updates(self.sampling):
      return step
    numbers = self._rounds(start, None)
    return start + int(np.searchsorted(numbers, numbers[step - start]))

  def release(self, step: int) -> accounting.Releases:
    """What update `step` releases, as a round of its own."""
    return self._release(1, self.expected_batch_size(step))

  def releases(
    self, start: int = 0, until: int | None = None
  ) -> list[accounting.Releases]:
    """What a branch releases from its first update on, in order of time.

    Args:
      start: its first update.
      until: the update before which it ends; None: the end of the plan.

    Returns:
      Runs of equal releases, one per round.
    """
    numbers = self._rounds(start, until)
    if not len(numbers):
      return []
    begins = np.flatnonzero(np.diff(numbers, prepend=-1))
    sizes = _sizes(self.schedule)[start:until]
    largest = np.maximum.reduceat(sizes, begins)
    edges = np.flatnonzero(np.diff(largest, prepend=-1, append=-1))
    return [
      self._release(int(b - a), int(largest[a]))
      for a, b in itertools.pairwise(edges)
    ]

  def _release(self, count: int, size: int) -> accounting.Releases:
    noise = self.noise_multiplier
    if not self.amplified:
      return accounting.Releases(count, 1.0, noise)
    prob = self._sampling_prob(size)
    if self.sampling == "truncated_poisson":
      return accounting.Releases(
        count,
        prob,
        noise,
        sampling=self.sampling,
        num_examples=self.num_examples,
        truncated_batch_size=self._truncated(size),
      )
    if self.sampling == "without_replacement":
      return accounting.Releases(
        count, prob, noise, self.sampling, self.num_examples
      )
    return accounting.Releases(count, prob, noise, group_size=self.group_size)

  def _sampling_prob(self, size: int) -> float:
    if self.sampling == "cyclic_poisson" and self.bands > 1:
      return size / (self.num_examples // self.bands)
    return size / self.num_examples

  def _truncated(self, size: int) -> int:
    spread = math.sqrt(size * (1 - self._sampling_prob(size)))
    limit = math.ceil(size + self.truncation_deviations * spread)
    return min(limit, self.num_examples)

  def _rounds(self, start: int, until: int | None) -> rounds.Whole:
    sizes = _sizes(self.schedule)[start:until]
    return rounds.numbers(self.sampling, sizes, self.num_examples, self.bands)

  def as_dict(self) -> dict[str, Any]:
    """Plain data: what the ledger records and a resumed run must equal."""
    return dataclasses.asdict(self)


def make_plan(
  settings: PrivacySettings,
  num_examples: int,
  *,
  calibrated_noise: float | None = None,
  noise_coefficients: Sequence[float] | None = None,
  others: Sequence[others_lib.OtherRelease] = (),
) -> PrivacyPlan:
  """Joins settings and corpus size; calibrates the noise if it is not given.

  Args:
    settings: the user's decisions.
    num_examples: records in the training store.
    calibrated_noise: what an earlier start of the same run was calibrated to;
      read only if `settings` gives no noise multiplier.
    noise_coefficients: those that an earlier start of the same run found.
    others: what else is released on the same corpus, within the same budget.

  Returns:
    The plan of the whole run.

  Raises:
    ValueError: a phase expects more examples than there are, no noise reaches
      the target epsilon, or others leave nothing of it or of delta.
  """
  if num_examples < 1:
    raise ValueError(f"num_examples={num_examples}: the corpus is empty.")
  left = others_lib.delta_left(others, settings.delta)
  num_examples = settings.public_num_examples or num_examples
  _check_sizes(settings, num_examples)
  if settings.delta >= 1 / num_examples:
    warnings.warn(
      f"delta={settings.delta:g} is not below 1/N={1 / num_examples:.3g}: such"
      " a delta allows publishing whole records. Choose a smaller delta.",
      stacklevel=2,
    )
  fields = {
    field.name: getattr(settings, field.name)
    for field in dataclasses.fields(settings)
  }
  noise_multiplier = settings.noise_multiplier or calibrated_noise
  fields["noise_multiplier"] = float(noise_multiplier or 1.0)
  if settings.private_metrics_share is None:
    fields["private_metrics_max_loss"] = None
    fields["private_metrics_max_norm"] = None
  if settings.bands > 1:
    fields["noise_coefficients"] = tuple(
      noise_coefficients
      or correlated_noise.coefficients(
        settings.bands, settings.schedule.num_steps
      )
    )
  plan = PrivacyPlan(num_examples=num_examples, **fields)
  if noise_multiplier is not None:
    return plan
  if settings.target_epsilon is None:
    raise ValueError("give noise_multiplier or target_epsilon.")
  _check_others(settings, others)
  paid = others_lib.releases(others)
  noise_multiplier = calibration.noise_multiplier(
    lambda noise: [
      *paid,
      *dataclasses.replace(plan, noise_multiplier=noise).releases(),
    ],
    settings.target_epsilon,
    left,
    settings.relation,
  )
  return dataclasses.replace(plan, noise_multiplier=noise_multiplier)


def _check_others(
  settings: PrivacySettings, others: Sequence[others_lib.OtherRelease]
) -> None:
  """Raises ValueError if they leave nothing of the budget."""
  spent = accounting.epsilon(
    others_lib.releases(others),
    others_lib.delta_left(others, settings.delta),
    settings.relation,
  ).value
  budget = settings.target_epsilon
  if budget is not None and spent >= budget:
    raise ValueError(
      f"target_epsilon={budget:g} is spent before the first update:"
      f" {'; '.join(other.what for other in others)}, which costs epsilon"
      f" {spent:.4g} at the delta that is left. Raise target_epsilon, or learn"
      " the vocabulary with a smaller --epsilon."
    )


def _check_sizes(settings: PrivacySettings, num_examples: int) -> None:
  """Raises ValueError if a phase expects more examples than there are."""
  groups = settings.bands if settings.sampling == "cyclic_poisson" else 1
  largest = max(
    settings.schedule.segments(),
    key=lambda segment: segment.expected_batch_size,
  )
  there_are = num_examples // groups
  if largest.expected_batch_size > there_are:
    of_them = "the corpus"
    if groups > 1:
      of_them = f"each of the {groups} groups (PrivacySettings.bands)"
    raise ValueError(
      f"expected_batch_size={largest.expected_batch_size} from update"
      f" {largest.first_step} on exceeds {of_them} of {there_are} examples:"
      " its sampling probability would be over 1. Lower that phase of"
      " BatchSchedule (--gin.FULL_BATCH) or bring more text."
    )


@functools.lru_cache(maxsize=16)
def _sizes(schedule: schedule_lib.BatchSchedule) -> rounds.Whole:
  """Expected batch size of every update."""
  segments = schedule.segments()
  return np.repeat(
    np.array([s.expected_batch_size for s in segments], np.int64),
    [s.num_steps for s in segments],
  )


def banded_noise(plan: PrivacyPlan) -> correlated_noise.BandedNoise | None:
  """How the plan's noise is correlated; None if it is not."""
  if plan.noise_coefficients is None:
    return None
  return correlated_noise.BandedNoise(tuple(plan.noise_coefficients))


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


def completed(recorded: Mapping[str, Any]) -> dict[str, Any]:
  """A recorded plan with the settings that came later, at their defaults."""
  later = {
    field.name: field.default
    for field in dataclasses.fields(PrivacySettings)
    if field.default is not dataclasses.MISSING
  }
  later["noise_coefficients"] = None
  if recorded.get("private_metrics_share") is None:
    later["private_metrics_max_loss"] = None
    later["private_metrics_max_norm"] = None
  return {**later, **recorded}


def differences(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
  """Names each field in which two plans (as plain data) differ."""
  later = completed(recorded)
  recorded = {n: x for n, x in later.items() if n in recorded or n in current}
  return [
    f"{name} was {recorded.get(name)!r} and is now {current.get(name)!r}"
    for name in sorted({*recorded, *current})
    if recorded.get(name) != current.get(name)
  ]
