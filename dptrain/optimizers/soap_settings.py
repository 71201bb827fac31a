"""What SOAP lets a user decide, learning rate and weight decay apart."""

import dataclasses

from jax.sharding import Mesh

from dptrain.optimizers import settings as settings_lib
from dptrain.optimizers import shampoo_blocks


@dataclasses.dataclass(frozen=True)
class SoapSettings:
  """All of SOAP but its learning rate and weight decay.

  Attributes:
    b1: decay of the average of gradients, in [0, 1).
    b2: decay of the average of squares in the eigenbasis, in (0, 1).
    factor_decay: of Shampoo's factors, in (0, 1); None for `b2`.
    eps: added to the root of the second moment; see `adamw.adamw`.
    start: the update (from 1) after which the first eigenbasis is taken. Up to
      then this is Adam.
    interval: updates between two steps of the eigenbasis.
    blocking: what gets an eigenbasis, in which blocks; `exponents` is not
      read. Everything else gets Adam.
    correct_noise: subtract what privacy noise adds to second moments, as
      `second_moments` says (noise looks the same in every basis); `update` then
      takes `noise_variance`.
    noise_floor: the least second moment, as a share of the noise's.
    mesh: whose devices share the eigenbases; None for the mesh in use, if any.
  """

  b1: float = 0.9
  b2: float = 0.99
  factor_decay: float | None = None
  eps: float = 1e-8
  start: int = 10
  interval: int = 10
  blocking: shampoo_blocks.Blocking = dataclasses.field(
    default_factory=shampoo_blocks.Blocking
  )
  correct_noise: bool = False
  noise_floor: float = 0.1
  mesh: Mesh | None = None

  def __post_init__(self) -> None:
    settings_lib.check_fraction("b1", self.b1)
    for name in ("b2", "factor_decay"):
      value = getattr(self, name)
      if value is not None and not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value} must lie between 0 and 1")
    settings_lib.check_positive("eps", self.eps)
    settings_lib.check_positive("noise_floor", self.noise_floor)
    for name in ("start", "interval"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
          f"SoapSettings.{name}={value!r} must be a whole number, 1 or more"
        )
