"""Refuses to train where this machine adds up wrongly."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

# The shape at which jaxlib 0.10.2 was seen to fail: 8 examples of [8, 32128].
_SHAPE = (8, 8, 32128)


@functools.cache
def max_error_of_clipped_sum(contraction: bool = False) -> float:
  """Largest error of a weighted sum over examples, jitted, against float64.

  Args:
    contraction: compute it as dptrain does (tensor contraction) instead of as a
      product and a sum.

  Returns:
    The largest absolute error over all coordinates.
  """
  generator = np.random.default_rng(0)
  gradients = generator.standard_normal(_SHAPE, np.float32)
  scales = generator.uniform(0.1, 1.0, _SHAPE[0]).astype(np.float32)

  @jax.jit
  def weighted_sum(g: jax.Array, s: jax.Array) -> jax.Array:
    if contraction:
      return jnp.tensordot(s, g, 1, precision=jax.lax.Precision.HIGHEST)
    return (g * s[:, None, None]).sum(0)

  truth = np.tensordot(scales.astype(np.float64), gradients, 1)
  return float(np.abs(weighted_sum(gradients, scales) - truth).max())


def check_sums() -> None:
  """Raises RuntimeError where a jitted clipped sum comes out wrong on CPU.

  dptrain's own sums are contractions, which no known version gets wrong; but a
  compiler that fails here may fail inside a model, too.
  """
  if jax.default_backend() != "cpu":
    return
  # numpy's maximum, unlike Python's, keeps a NaN.
  error = np.maximum(max_error_of_clipped_sum(), max_error_of_clipped_sum(True))
  if not error < 1e-3:
    version = importlib.metadata.version("jaxlib")
    raise RuntimeError(
      f"jaxlib {version} adds up gradients wrongly on this CPU"
      f" (error {error:.3g} where 0.001 would be much): clipping would not"
      " bound anything. Install the locked jax and jaxlib (0.10.1), or set"
      " XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce."
    )
