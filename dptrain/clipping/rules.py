"""Clipping rules: from the norm of a gradient to the share of it that counts.

Shapes: B batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

KINDS = ("flat", "normalized", "automatic")


@dataclasses.dataclass(frozen=True)
class ClippingRule:
  """How one example's whole gradient, as one vector, is bounded.

  - "flat": g * min(1, C / |g|), the rule of DP-SGD (arXiv 1607.00133).
  - "normalized": flat, then divided by C, so that the learning rate does not
    depend on C (arXiv 2204.13650, section 3.3).
  - "automatic": g / (|g| + gamma), no threshold to tune (arXiv 2206.07136).

  Formal guarantee: unit: one example. The contribution of an example to the sum
  has L2 norm at most `sensitivity`, whatever the example; so removing one, or
  replacing it by one that contributes zero, moves the sum by at most that
  (replacing it by another example: by at most twice that). `l2_clip_norm` and
  `automatic_gamma` are public constants. Up to the rounding of float32.

  Attributes:
    kind: one of `KINDS`.
    l2_clip_norm: C.
    automatic_gamma: gamma.
  """

  kind: str = "flat"
  l2_clip_norm: float = 1.0
  automatic_gamma: float = 0.01

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(
        f"ClippingRule.kind={self.kind!r} is unknown; use one of {KINDS}."
      )
    for name in ("l2_clip_norm", "automatic_gamma"):
      value = getattr(self, name)
      if not 0 < value < float("inf"):
        raise ValueError(
          f"ClippingRule.{name}={value} must be a positive, finite number."
        )

  @property
  def sensitivity(self) -> float:
    """Largest L2 norm of one example's contribution to a sum."""
    return self.l2_clip_norm if self.kind == "flat" else 1.0

  def scales(self, norms: jax.Array) -> jax.Array:
    """The factors that bound gradients of the given norms.

    Args:
      norms: [B] L2 norms of whole gradients, finite.

    Returns:
      [B] factors s with s * norm <= `sensitivity`.
    """
    if self.kind == "automatic":
      return 1.0 / (norms + self.automatic_gamma)
    # The maximum keeps the factor at 1 for short gradients, zero ones included.
    flat = self.l2_clip_norm / jnp.maximum(norms, self.l2_clip_norm)
    return flat if self.kind == "flat" else flat / self.l2_clip_norm
