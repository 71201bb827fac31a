"""Clipping rules: from the norms of a gradient to the share of it that counts.

Shapes: B batch.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("flat", "normalized", "automatic")

# Squares of entries below 1e-19 vanish in float32. Under a smaller bound than
# this, a gradient could pass whose norm has missed most of it.
SMALLEST_NORM = 1e-10

# From the path of a parameter ("layers", "mlp_in", "kernel") to its group.
Grouping = Callable[[tuple[str, ...]], str]


def by_parameter(path: tuple[str, ...]) -> str:
  """Every parameter is a group of its own."""
  return "/".join(path)


def by_module(path: tuple[str, ...]) -> str:
  """The parameters of one outermost module are a group."""
  return path[0]


@dataclasses.dataclass(frozen=True)
class ClippingRule:
  """How one example's gradient is bounded.

  - "flat": g * min(1, C / |g|), the rule of DP-SGD (arXiv 1607.00133).
  - "normalized": flat, then divided by C, so that the learning rate does not
    depend on C (arXiv 2204.13650, section 3.3).
  - "automatic": g / (|g| + gamma), no threshold to tune (arXiv 2206.07136).

  By default g is the whole gradient, as one vector. With `groups`, each of K
  groups of parameters is clipped on its own, to a share 1/sqrt(K) of the bound
  (arXiv 2212.01539), so that the whole keeps the same sensitivity.

  Formal guarantee: unit: one example. The contribution of an example to the sum
  has L2 norm at most `sensitivity`, whatever the example; so removing one, or
  replacing it by one that contributes zero, moves the sum by at most that
  (replacing it by another example: by at most twice that). `l2_clip_norm`,
  `automatic_gamma` and `groups` are public. Up to the rounding of float32.

  Attributes:
    kind: one of `KINDS`.
    l2_clip_norm: C, a float; within a compiled update it may be a scalar array
      (`adaptation.NormAdaptation`), and `sensitivity` is one then.
    automatic_gamma: gamma.
    groups: None to clip the whole gradient, or a grouping of parameters.
  """

  kind: str = "flat"
  l2_clip_norm: Any = 1.0
  automatic_gamma: float = 0.01
  groups: Grouping | None = None

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(
        f"ClippingRule.kind={self.kind!r} is unknown; use one of {KINDS}."
      )
    for name in ("l2_clip_norm", "automatic_gamma"):
      value = getattr(self, name)
      if isinstance(value, jax.Array):
        continue  # a norm that adapts: it has a value at run time only
      if not 0 < value < float("inf"):
        raise ValueError(
          f"ClippingRule.{name}={value} must be a positive, finite number."
        )
      if value < SMALLEST_NORM:
        raise ValueError(
          f"ClippingRule.{name}={value} is below {SMALLEST_NORM}, where float32"
          " norms of gradients are no longer true; scale the loss up instead."
        )

  @property
  def sensitivity(self) -> Any:
    """Largest L2 norm of one example's contribution to a sum."""
    return self.l2_clip_norm if self.kind == "flat" else 1.0

  def scales(self, norms: jax.Array, num_groups: int = 1) -> jax.Array:
    """The factors that bound gradients of the given norms.

    Args:
      norms: [B] L2 norms of whole gradients, or of one group's; finite.
      num_groups: K, how many groups share the bound.

    Returns:
      [B] factors s with s * norm <= `sensitivity` / sqrt(K).
    """
    share = 1.0 / math.sqrt(num_groups)
    if self.kind == "automatic":
      return share / (norms + self.automatic_gamma)
    bound = self.l2_clip_norm * share
    # The maximum keeps the factor at 1 for short gradients, zero ones included.
    flat = bound / jnp.maximum(norms, bound)
    return flat if self.kind == "flat" else flat / self.l2_clip_norm
