"""A clip norm that follows a quantile of the gradients' norms, privately.

Source: Differentially Private Learning with Adaptive Clipping (arXiv
1905.03871, algorithm 1).

Shapes: B batch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dptrain.clipping import rules
from dptrain.clipping import shares

# Beyond it, noise in float32 would come near overflow.
LARGEST_NORM = 1e10


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormAdaptation:
  """Moves the clip norm C until a given share of the gradients is shorter.

  Each update tallies, over its examples, those with a gradient of norm at most
  C; the tally gets noise of its own, and C moves by the factor
  exp(-learning_rate * (share so found - target_quantile)).

  Formal guarantee: unit: one example; zero-out or add/remove. An example adds
  to the tally +1/2 or -1/2, or nothing if it takes no part: sensitivity 1/2.
  With z the noise multiplier of the plan and s = budget_share, the tally gets
  noise of z / sqrt(s) times that, and the gradients' noise grows to match:
  together they are one Gaussian mechanism of noise multiplier z (`shares`;
  1905.03871, theorem 1). C is post-processing of it. Public: all attributes.

  Attributes:
    target_quantile: share of the gradients that shall be no longer than C.
    learning_rate: of log C.
    budget_share: s; 0.01 makes the gradients' noise 0.5 % larger.
  """

  target_quantile: float = 0.5
  learning_rate: float = 0.2
  budget_share: float = 0.01

  def __post_init__(self) -> None:
    for name, open_ended in (
      ("target_quantile", False),
      ("budget_share", False),
      ("learning_rate", True),
    ):
      value = getattr(self, name)
      most = math.inf if open_ended else 1.0
      if isinstance(value, bool) or not 0 < value < most:
        told = "positive and finite" if open_ended else "between 0 and 1"
        raise ValueError(f"NormAdaptation.{name}={value!r} must be {told}.")

  def tally_noise_stddev(
    self, noise_multiplier: jax.Array | float
  ) -> jax.Array | float:
    """Standard deviation of the noise on `tally`, in the units of `tally`."""
    return shares.noise_stddev(0.5, noise_multiplier, self.budget_share)

  def tally(
    self, norms: jax.Array, contributes: jax.Array, l2_clip_norm: jax.Array
  ) -> jax.Array:
    """Sum over examples of +1/2 where the norm is at most C, else -1/2.

    Args:
      norms: [B] norms before clipping.
      contributes: [B] bool; others add nothing.
      l2_clip_norm: C, a scalar.

    Returns:
      A float32 scalar. PRIVATE until it has noise.
    """
    halves = jnp.where(norms <= l2_clip_norm, 0.5, -0.5)
    return jnp.sum(jnp.where(contributes, halves, 0.0), dtype=jnp.float32)

  def moved(
    self,
    l2_clip_norm: jax.Array,
    noisy_tally: jax.Array,
    expected_batch_size: jax.Array | float,
  ) -> jax.Array:
    """The clip norm of the next update.

    It stays within `rules.SMALLEST_NORM` and `LARGEST_NORM`: gradients that
    vanish for good would else drive it to 0, and 0 / 0 is nan.

    Args:
      l2_clip_norm: C, a scalar.
      noisy_tally: `tally` over the update, with its noise.
      expected_batch_size: the public constant to divide by.
    """
    share = jnp.clip(noisy_tally / expected_batch_size + 0.5, 0.0, 1.0)
    step = self.learning_rate * (share - self.target_quantile)
    moved = l2_clip_norm * jnp.exp(-step)
    return jnp.clip(moved, rules.SMALLEST_NORM, LARGEST_NORM)
