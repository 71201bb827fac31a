"""Noise that partly cancels over the updates of a run (BandMF).

An optimizer adds gradients up, so what hurts is the sum of all noise so far.
Each update's noise here takes back part of that of the updates before it
(arXiv 2306.08153; the streaming form is algorithm 9 there).

Shapes: S updates, b bands.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class BandedNoise:
  """Turns independent noise into that of a banded Toeplitz strategy.

  Formal guarantee: with C the lower-triangular Toeplitz matrix of
  `coefficients` (c_0, ..., c_{b-1}), the noise of S updates is C^-1 z for
  independent z: what is released, g + C^-1 z, is post-processing of C g + z.
  Unit: a record that takes part in updates at least b apart, so that the
  columns of C which it meets are orthogonal, each of norm at most 1, the norm
  of the coefficients: each of its parts costs what one release with independent
  noise z does (arXiv 2306.08153, theorem 4, also for gradients that depend on
  earlier releases). Public: the coefficients. The history is the noise itself:
  PRIVATE, never to be saved with what is published.

  Attributes:
    coefficients: float [b], of norm 1; (1.0,) leaves noise independent.
  """

  coefficients: tuple[float, ...] = (1.0,)

  def __post_init__(self) -> None:
    values = np.asarray(self.coefficients, np.float64)
    norm = np.linalg.norm(values)
    if values.ndim != 1 or not values.size or not values[0] > 0:
      raise ValueError(
        f"BandedNoise.coefficients={self.coefficients} must be numbers of which"
        " the first is positive."
      )
    if not abs(norm - 1.0) < 1e-6:
      raise ValueError(
        f"BandedNoise.coefficients={self.coefficients} have the norm {norm:g};"
        " divide them by it, or the noise does not fit the sensitivity."
      )

  @property
  def bands(self) -> int:
    """How many updates the noise of one is spread over."""
    return len(self.coefficients)

  def largest_stddev(self, num_steps: int) -> float:
    """The most that one coordinate's noise may spread, in units of z.

    Each update's noise is larger than independent noise; it is their sums that
    are smaller.

    Args:
      num_steps: S, of the run.
    """
    return float(self.stddevs(num_steps)[-1])

  def stddevs(self, num_steps: int) -> npt.NDArray[np.float64]:
    """How far one coordinate's noise spreads, update by update: float64 [S].

    Args:
      num_steps: S, counted from where the branch begins.
    """
    row = _toeplitz().inverse_coef(
      np.asarray(self.coefficients, np.float32), num_steps
    )
    return np.sqrt(np.cumsum(np.asarray(row, np.float64) ** 2))

  def begin(self, like: Any) -> Any:
    """The history before a branch's first update.

    Args:
      like: a tree of float32 arrays, or their shapes.

    Returns:
      For each array one of shape [b - 1, ...].
    """
    return self._inverse().init_multiply(like)

  def next(self, independent: Any, history: Any) -> tuple[Any, Any]:
    """The noise of the next update, and the history for the one after.

    Args:
      independent: fresh standard normal noise, a tree of arrays.
      history: from `begin` or the last `next`.
    """
    import jax  # planning does without

    # An accelerator's quicker products round in ways that depend on what the
    # noise is taken from: it must be one linear map for both neighbours.
    with jax.default_matmul_precision("highest"):
      return self._inverse().multiply_next(independent, history)

  def _inverse(self) -> Any:
    coefficients = np.asarray(self.coefficients, np.float32)
    return _toeplitz().inverse_as_streaming_matrix(coefficients)


def coefficients(bands: int, num_steps: int) -> tuple[float, ...]:
  """The strategy that makes the mean squared error of all sums so far least.

  >>> from jax_privacy.matrix_factorization import toeplitz
  >>> errors = [toeplitz.loss(np.array(coefficients(b, 400)), n=400)
  ...           for b in (1, 4)]
  >>> print(f"{float(errors[1] / errors[0]):.2f}")
  0.27

  Args:
    bands: b.
    num_steps: S, of the whole run.

  Returns:
    Float [min(b, S)], of norm 1, from jax-privacy's search.
  """
  bands = min(bands, num_steps)
  if bands == 1:
    return (1.0,)
  found = _toeplitz().optimize_banded_toeplitz(num_steps, bands)
  values = np.asarray(found, np.float64)
  return tuple((values / np.linalg.norm(values)).tolist())


def _toeplitz() -> Any:
  # Imported late: it takes a second and brings JAX, which plans do without.
  from jax_privacy.matrix_factorization import toeplitz

  return toeplitz
