"""How one update's budget is shared out among the vectors that it releases.

An update releases the sum of clipped gradients and, beside it, small vectors of
other sums (a tally, metrics), each of which takes a share s of the budget
1 / z^2, with z the noise multiplier of the plan.

Formal guarantee: unit: one example; zero-out or add/remove. A vector of
sensitivity d and share s gets noise of standard deviation z * d / sqrt(s), and
the gradients, to which 1 - sum(s) is left, theirs times z / sqrt(1 - sum(s)).
Scaled by their noise, all are one vector, which one example moves by at most
sqrt((1 - sum(s)) / z^2 + sum(s / z^2)) = 1 / z: one Gaussian mechanism of noise
multiplier z, which is what the plan prices (arXiv 1905.03871, theorem 1).
Public: the shares and z.
"""

from collections.abc import Iterable, Mapping
import math

import jax


def check(shares: Mapping[str, float]) -> None:
  """Raises ValueError unless each share is one, and gradients keep something.

  Args:
    shares: by the names of the settings that they come from.
  """
  for name, share in shares.items():
    if isinstance(share, bool) or not 0 < share < 1:
      raise ValueError(f"{name}={share!r} must be between 0 and 1.")
  if shares and sum(shares.values()) >= 1:
    told = " and ".join(f"{name}={share}" for name, share in shares.items())
    raise ValueError(
      f"{told} leave nothing of an update's budget to the gradients: choose"
      " shares whose sum is below 1."
    )


def gradient_noise_factor(shares: Iterable[float]) -> float:
  """By how much the gradients' noise exceeds that of an update without shares.

  Args:
    shares: what all other vectors of the update take.
  """
  return 1.0 / math.sqrt(1.0 - sum(shares))


def noise_stddev(
  sensitivity: float, noise_multiplier: jax.Array | float, share: float
) -> jax.Array | float:
  """Standard deviation of the noise on a vector, in the vector's units.

  Args:
    sensitivity: by how much one example moves the vector, in L2 norm.
    noise_multiplier: z, of the plan.
    share: of the update's budget.
  """
  return sensitivity * noise_multiplier / math.sqrt(share)
