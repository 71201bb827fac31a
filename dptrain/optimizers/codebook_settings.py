"""Settings of `codebook_learning`."""

import dataclasses

from dptrain.optimizers import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookSettings:
  """How an N-Grammer's codebooks and tables learn.

  What they learn from (private or exact means, gradients, nothing) is the
  model's own setting.

  Attributes:
    decay: of the running means, in [0, 1). A centre moves by 1 - decay of its
      distance from the mean of what was assigned to it; arXiv 2207.06366 has
      0.999 in its code.
    mass_decay: likewise of the masses that means are divided by; None: as
      `decay`, and 0 for means that are exact. 0 divides by this update's count
      alone, as the paper's code does: under noise that is far too noisy.
    min_mass: least mass of a cluster that is not empty, above 0; in units of
      the gradient.
    mass_floor: the same in standard deviations of the noise in its mass; the
      larger of the two counts. A cluster below it keeps its centre.
    restart_after: updates in a row after which an empty cluster starts anew
      beside another one; 0: never.
    restart_spread: how far beside it: standard deviation over the root mean
      square of that centre.
    seed: of the public draws of restarts.
    centre_rate: what steps of centres that learn by gradient are multiplied by.
    table_rate: what steps of n-gram tables are multiplied by; the paper's code
      has 1e-2 beside 3e-4.
    row_threshold: where rows are selected: least noisy count of a row that
      moves, in standard deviations of the noise.
    weight_decay: let the optimizer see the values of tables and centres, for
      its decay (which the rates above multiply, too). Otherwise it takes them
      for 0, so that decoupled decay takes nothing off, and steps that are
      relative to weights (LAMB, LARS) are taken as they are.
  """

  decay: float = 0.999
  mass_decay: float | None = None
  min_mass: float = 1e-12
  mass_floor: float = 3.0
  restart_after: int = 100
  restart_spread: float = 0.1
  seed: int = 0
  centre_rate: float = 1.0
  table_rate: float = 33.0
  row_threshold: float = 4.0
  weight_decay: bool = False

  def __post_init__(self) -> None:
    """Raises ValueError: names the setting that is out of range."""
    name = "CodebookSettings."
    settings.check_fraction(f"{name}decay", self.decay)
    if self.mass_decay is not None:
      settings.check_fraction(f"{name}mass_decay", self.mass_decay)
    settings.check_positive(f"{name}min_mass", self.min_mass)
    for part in ("mass_floor", "restart_spread", "row_threshold"):
      settings.check_not_negative(name + part, getattr(self, part))
    for part in ("centre_rate", "table_rate"):
      settings.check_positive(name + part, getattr(self, part))
    for part in ("restart_after", "seed"):
      value = getattr(self, part)
      if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
          f"{name}{part}={value!r} must be a whole number, 0 or more"
        )
    if not isinstance(self.weight_decay, bool):
      raise ValueError(
        f"{name}weight_decay={self.weight_decay!r} must be True or False"
      )
