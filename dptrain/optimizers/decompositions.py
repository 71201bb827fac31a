"""Decompositions of stacks of matrices, one matrix at a time on CPU.

jaxlib 0.10.1 deals a batched LAPACK call out to a pool of threads, from a
thread of that same pool, and waits: two such calls at once on a machine of two
cores wait for each other for ever. It was seen in training; a program of six
independent batched Cholesky decompositions stops within seconds, and ordering
them by `optimization_barrier` does not help. A call for one matrix waits for
nobody.

Shapes: M matrices of size b x b.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues [M, b], rising, and eigenvectors [M, b, b] as columns."""
  values, vectors = _each(lambda a: tuple(jnp.linalg.eigh(a)), matrices)
  return values, vectors


def cholesky(matrices: jax.Array) -> jax.Array:
  """Lower factors [M, b, b]; NaN where a matrix is not positive definite."""
  (lower,) = _each(lambda a: (jnp.linalg.cholesky(a),), matrices)
  return lower


def orthonormal(matrices: jax.Array) -> jax.Array:
  """The orthogonal factors [M, b, b] of QR decompositions."""
  (q,) = _each(lambda a: (jnp.linalg.qr(a)[0],), matrices)
  return q


def _each(
  function: Callable[[jax.Array], tuple[jax.Array, ...]], matrices: jax.Array
) -> tuple[jax.Array, ...]:
  if jax.default_backend() != "cpu":
    return function(matrices)
  return jax.lax.map(function, matrices)
