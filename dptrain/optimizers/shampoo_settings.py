"""What Shampoo lets a user decide, learning rate and weight decay apart."""

import dataclasses

from jax.sharding import Mesh
import optax

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import magnitudes
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import quantized_matrices
from dptrain.optimizers import settings as settings_lib
from dptrain.optimizers import shampoo_blocks


@dataclasses.dataclass(frozen=True)
class ShampooSettings:
  """All of Shampoo but its learning rate and weight decay.

  Attributes:
    momentum: of updates, applied after grafting; in [0, 1), 0 keeps none.
    moving_average: momentum averages updates, debiased, and does not sum them.
    nesterov: look one momentum step ahead.
    beta2: decay of factors and magnitudes, in (0, 1]; 1 sums factors up
      (magnitudes then decay by 0.999 where they average).
    graft: whose length an update has, layer by layer: one of
      `magnitudes.NAMES`, any optax transformation (without learning rate and
      momentum), or None for the preconditioned gradient's own.
    eps: of the magnitude; like Adam's, well under the noise per coordinate.
    blocking: what is preconditioned, and in which blocks.
    roots: how roots are computed.
    refresh: when.
    statistics_bits: 32 or 16, per entry of a factor in the state. 16 raises
      the ridge of a factor of size b to about sqrt(b) * 2e-5.
    root_bits: 32, 16 or 8, per entry of a root in the state.
    subtract_noise: take off each factor what `noise_variance` added to it (see
      `preconditioner_statistics`), as far as it stays positive semi-definite;
      `update` then needs `noise_variance`.
    mesh: whose devices share the roots; None for the mesh in use, if any.
  """

  momentum: float = 0.9
  moving_average: bool = True
  nesterov: bool = False
  beta2: float = 0.999
  graft: str | optax.GradientTransformation | None = "adam"
  eps: float = 1e-8
  blocking: shampoo_blocks.Blocking = dataclasses.field(
    default_factory=shampoo_blocks.Blocking
  )
  roots: inverse_roots.RootSettings = dataclasses.field(
    default_factory=inverse_roots.RootSettings
  )
  refresh: preconditioner_refresh.RefreshSettings = dataclasses.field(
    default_factory=preconditioner_refresh.RefreshSettings
  )
  statistics_bits: int = 32
  root_bits: int = 32
  subtract_noise: bool = False
  mesh: Mesh | None = None

  def __post_init__(self) -> None:
    settings_lib.check_fraction("momentum", self.momentum)
    settings_lib.check_positive("eps", self.eps)
    if not 0.0 < self.beta2 <= 1.0:
      raise ValueError(f"beta2={self.beta2} must lie in (0, 1]")
    if self.nesterov and not self.momentum:
      raise ValueError(
        "nesterov=True needs momentum, but momentum=0.0; set momentum or"
        " nesterov=False"
      )
    if isinstance(self.graft, str):
      magnitudes.named(self.graft, 0.5, self.eps)
    bits = quantized_matrices.check_bits
    bits("statistics_bits", self.statistics_bits, (16, 32))
    bits("root_bits", self.root_bits, (8, 16, 32))
    if self.subtract_noise and self.roots.method == "newton":
      raise ValueError(
        "subtract_noise=True needs eigenvalues, which RootSettings.method="
        "'newton' does not know; use 'eigh'"
      )

  def magnitude(self) -> optax.GradientTransformationExtraArgs:
    """The transformation whose length updates have."""
    found = self.graft
    if found is None:
      found = optax.identity()
    elif isinstance(found, str):
      b2 = self.beta2 if self.beta2 < 1.0 else 0.999
      found = magnitudes.named(found, b2, self.eps)
    return optax.with_extra_args_support(found)
