"""Training metrics that are released with noise, in the gradients' own release.

Shapes: B batch, K metrics.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.clipping import per_example
from dptrain.clipping import shares

# Of what `released` is known by among the figures of an update.
PREFIX = "private/"
NAMES = ("loss", "accuracy", "clip_fraction", "gradient_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateMetrics:
  """Means over an update's examples, with noise that the plan already prices.

  Each example has a value in [0, range] of each metric; values beyond are
  clipped. Divided by the range and centred, they lie in [-1/2, 1/2], and their
  sums are K more coordinates of the update's release.

  - loss: of the example.
  - accuracy: right predictions / masked positions of the example; 0 if none is
    masked.
  - clip_fraction: 1 if the gradient is longer than the clip norm C, else 0.
  - gradient_norm: norm of the whole gradient before clipping, in units of C.

  Formal guarantee: unit: one example; zero-out or add/remove. An example adds
  to the K sums a vector of entries within [-1/2, 1/2], whatever its loss and
  its gradient are, or exactly 0 if it takes no part: sensitivity sqrt(K) / 2.
  They get noise of z / sqrt(s) times that, with z the plan's noise multiplier
  and s = `budget_share`, and the gradients' noise grows to match: together they
  are one Gaussian mechanism of noise multiplier z (`shares`). Means, averages
  over updates and what is drawn of them are post-processing. Public: all
  attributes, C and the expected batch size.

  Attributes:
    budget_share: s; 0.01 makes the gradients' noise 0.5 % larger.
    names: what is released, some of `NAMES`; the fewer, the less noise.
    max_loss: range of the loss. Guessing uniformly among V tokens loses log V.
    max_norm: range of the gradients' norm, in units of C.
  """

  budget_share: float = 0.01
  names: tuple[str, ...] = NAMES
  max_loss: float = 12.0
  max_norm: float = 10.0

  def __post_init__(self) -> None:
    shares.check({"PrivateMetrics.budget_share": self.budget_share})
    known = set(self.names) <= set(NAMES)
    if not self.names or not known or len(set(self.names)) < len(self.names):
      raise ValueError(
        f"PrivateMetrics.names={self.names!r}: name one or more of"
        f" {', '.join(NAMES)}, each once."
      )
    for name in ("max_loss", "max_norm"):
      value = getattr(self, name)
      if isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(
          f"PrivateMetrics.{name}={value!r} must be a positive, finite number."
        )

  @property
  def ranges(self) -> dict[str, float]:
    """The largest value of each metric; its noise is proportional to it."""
    largest = {"loss": self.max_loss, "gradient_norm": self.max_norm}
    return {name: largest.get(name, 1.0) for name in self.names}

  @property
  def sensitivity(self) -> float:
    """Largest L2 norm of one example's contribution to `sums`."""
    return math.sqrt(len(self.names)) / 2.0

  def noise_stddev(
    self, noise_multiplier: jax.Array | float
  ) -> jax.Array | float:
    """Standard deviation of the noise on each of `sums`, in their units."""
    return shares.noise_stddev(
      self.sensitivity, noise_multiplier, self.budget_share
    )

  def zeros(self) -> jax.Array:
    """Sums [K] over no examples."""
    return jnp.zeros(len(self.names), jnp.float32)

  def sums(
    self, clipped: per_example.ClippedSum, l2_clip_norm: Any
  ) -> jax.Array:
    """Sums over the examples of one batch of scaled, centred values.

    Args:
      clipped: what was seen while clipping them.
      l2_clip_norm: C, a scalar.

    Returns:
      Float32 [K], in the order of `names`. PRIVATE until they have noise.

    Raises:
      ValueError: accuracy is asked for, and the loss function does not tell it.
    """
    scaled = jnp.stack(
      [
        _values(name, clipped, l2_clip_norm).astype(jnp.float32) / largest
        for name, largest in self.ranges.items()
      ]
    )
    # An example must not move the sums by more, nor by NaN, whatever it is.
    bounded = jnp.clip(jnp.nan_to_num(scaled, nan=0.0), 0.0, 1.0) - 0.5
    return jnp.sum(jnp.where(clipped.contributes, bounded, 0.0), axis=1)

  def released(
    self, noisy_sums: jax.Array, expected_batch_size: jax.Array | float
  ) -> dict[str, jax.Array]:
    """Means in the metrics' own units, `PREFIX` before their names.

    An estimate: apart from the noise, the realised batch differs from what is
    divided by, which moves a mean m by (m - range / 2) times its relative
    deviation. Values may lie outside of [0, range].

    Args:
      noisy_sums: [K] `sums` over the update, with their noise.
      expected_batch_size: the public constant to divide by.
    """
    means = noisy_sums / expected_batch_size + 0.5
    return {
      PREFIX + name: largest * means[index]
      for index, (name, largest) in enumerate(self.ranges.items())
    }

  def noise_of_means(
    self, noise_multiplier: float, expected_batch_size: float
  ) -> dict[str, float]:
    """Standard deviations of the noise in `released`, by metric; public."""
    of_sums = float(self.noise_stddev(noise_multiplier))
    return {
      name: largest * of_sums / expected_batch_size
      for name, largest in self.ranges.items()
    }


def separated(
  figures: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits the figures that `PrivateStep.finish` returned.

  Returns:
    Released metrics by their names; and the rest, which is not protected.
  """
  released = {
    name.removeprefix(PREFIX): value
    for name, value in figures.items()
    if name.startswith(PREFIX)
  }
  rest = {k: v for k, v in figures.items() if not k.startswith(PREFIX)}
  return released, rest


def _values(
  name: str, clipped: per_example.ClippedSum, l2_clip_norm: Any
) -> jax.Array:
  """[B] values of one metric, not bounded yet. PRIVATE."""
  if name == "loss":
    return clipped.losses
  if name == "clip_fraction":
    return clipped.norms > l2_clip_norm
  if name == "gradient_norm":
    return clipped.norms / l2_clip_norm
  aux = clipped.aux
  if not isinstance(aux, dict) or not {"correct", "masked"} <= set(aux):
    raise ValueError(
      "PrivateMetrics.names has 'accuracy', but the loss function returns no"
      " 'correct' and 'masked' beside the losses: return them, or leave"
      " accuracy out."
    )
  correct, masked = aux["correct"], aux["masked"]
  if not correct.shape == masked.shape == clipped.losses.shape:
    raise ValueError(
      f"'correct' and 'masked' have the shapes {correct.shape} and"
      f" {masked.shape}; PrivateMetrics needs one number per example of each,"
      f" {clipped.losses.shape}."
    )
  return jnp.where(masked > 0, correct / jnp.where(masked > 0, masked, 1), 0.0)
