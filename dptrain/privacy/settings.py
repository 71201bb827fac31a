"""What a user decides about privacy: the settings that gin binds."""

import dataclasses

from dptrain.privacy import accounting
from dptrain.privacy import mechanisms
from dptrain.privacy import schedule as schedule_lib

UNITS = ("record", "document", "user")
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
    relation: neighbouring relation: "zero_out" (a unit is replaced by one that
      contributes nothing), "replace_one" (by any other), "add_or_remove_one".
      Under the first two the number of records is public.
    sampling: how the records of an update are drawn, a key of
      `mechanisms.PRICED`, which also says under which relation: "poisson";
      "truncated_poisson" (at most so many records); "without_replacement" (a
      fixed number); "shuffled" (one pass after another in random order) and
      "balls_in_bins" (each record in every n-th update), both priced without
      amplification; "cyclic_poisson" (Poisson within one of `bands` groups in
      turn).
    truncation_deviations: how far above the expected batch "truncated_poisson"
      cuts, in standard deviations of the sample's size.
    bands: of correlated noise (BandMF, arXiv 2306.08153): each update's noise
      cancels part of that of the `bands - 1` updates before. Over 1 it needs
      "cyclic_poisson". 1: independent noise.
    public_num_examples: for "add_or_remove_one", where the number of records is
      private: a public estimate, from which sampling probabilities follow.
    unit: the privacy unit: "record" (one fixed-length sequence), "document" or
      "user" (all that has one key in the corpus's feature "unit").
    records_per_unit: k, how many records of a document or user take part at
      most; the others are left out, by a secret choice.
    unit_sampling: for documents and users: "units" (these are sampled, and a
      unit's records make one gradient, that of the mean of their losses) or
      "records" (records are sampled, and groups of k are priced).
    unit_name: what the report calls the unit; None: a general name.
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
  truncation_deviations: float = 6.0
  bands: int = 1
  public_num_examples: int | None = None
  unit: str = "record"
  records_per_unit: int = 1
  unit_sampling: str = "units"
  unit_name: str | None = None

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
      ("unit", UNITS),
      ("unit_sampling", ("units", "records")),
    ):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
          f"PrivacySettings.{name}={value!r} is not supported; use one of"
          f" {', '.join(map(repr, known))}."
        )
    self._check_sampling()
    self._check_unit()

  def _check_unit(self) -> None:
    k = self.records_per_unit
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
      raise ValueError(
        f"PrivacySettings.records_per_unit={k!r} must be a whole number >= 1."
      )
    if self.unit == "record" and k > 1:
      raise ValueError(
        f"PrivacySettings.records_per_unit={k} is for unit='document' or"
        " 'user'; a record is one record."
      )
    grouped = self.unit_sampling == "records" and k > 1
    if grouped and (self.sampling, self.relation) != ("poisson", "zero_out"):
      raise ValueError(
        "PrivacySettings.unit_sampling='records' is priced for"
        " sampling='poisson' and relation='zero_out' only, not for"
        f" {self.sampling!r} and {self.relation!r}; use unit_sampling='units'."
      )

  def _check_sampling(self) -> None:
    mechanisms.check_priced(self.sampling, self.relation)
    if isinstance(self.bands, bool) or not (
      isinstance(self.bands, int) and self.bands >= 1
    ):
      raise ValueError(
        f"PrivacySettings.bands={self.bands!r} must be a whole number >= 1."
      )
    if self.bands > 1 and self.sampling != "cyclic_poisson":
      raise ValueError(
        f"PrivacySettings.bands={self.bands} correlates the noise of updates,"
        " in which a record may then not take part together: it needs"
        f" sampling='cyclic_poisson', not {self.sampling!r}."
      )
    if not 0 < self.truncation_deviations < float("inf"):
      raise ValueError(
        f"PrivacySettings.truncation_deviations={self.truncation_deviations}"
        " must be a positive, finite number."
      )
    sizes = {s.expected_batch_size for s in self.schedule.segments()}
    if self.sampling == "balls_in_bins" and len(sizes) > 1:
      raise ValueError(
        "sampling='balls_in_bins' throws every record into one bin for good, so"
        " BatchSchedule must be constant; use 'shuffled' for one that grows."
      )
    self._check_public_number()

  def _check_public_number(self) -> None:
    number = self.public_num_examples
    if self.relation != "add_or_remove_one":
      if number is not None:
        raise ValueError(
          f"PrivacySettings.public_num_examples={number} is for"
          f" relation='add_or_remove_one'; under {self.relation!r} the number"
          " of records itself is public."
        )
      return
    whole = isinstance(number, int) and not isinstance(number, bool)
    if number is None or not whole or number < 1:
      raise ValueError(
        f"PrivacySettings.public_num_examples={number} must be a whole number"
        " >= 1 under relation='add_or_remove_one', where the true number of"
        " records is private: give a public estimate of it."
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
