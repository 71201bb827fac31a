"""Eigenbases of stacks of factors, followed as the factors change.

The first basis is an eigendecomposition. Later ones take one step of orthogonal
iteration from the basis before (a product and a QR decomposition), which a
factor that moves slowly keeps close to its eigenvectors (arXiv 2409.11321,
section 4).

Shapes: M factors of size b x b; column j of a basis is its j-th direction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dptrain.optimizers import decompositions

_HIGHEST = jax.lax.Precision.HIGHEST
# Keeps directions that a factor has not seen where they are.
_RIDGE = 1e-6
_LEAST_ORTHOGONAL = 1e-3


class Bases(NamedTuple):
  """Bases, and which could not be found.

  Attributes:
    vectors: [M, b, b], largest eigenvalue first.
    failed: [M] bool: those stayed as they were.
  """

  vectors: jax.Array
  failed: jax.Array


def decomposed(factors: jax.Array, old: jax.Array) -> Bases:
  """Eigenvectors of factors.

  Args:
    factors: [M, b, b] positive semi-definite; where one is 0 its basis stays.
    old: [M, b, b] bases, for those that fail.
  """
  _, vectors = decompositions.eigh(_scaled(factors))
  return _checked(factors, vectors[:, :, ::-1], old)


def followed(factors: jax.Array, old: jax.Array) -> Bases:
  """One step of orthogonal iteration.

  Directions are first put in the order of their estimated eigenvalues: QR
  keeps the first ones best.

  Args:
    factors: [M, b, b] positive semi-definite; where one is 0 its basis stays.
    old: [M, b, b] bases.
  """
  scaled = _scaled(factors)
  images = jnp.matmul(scaled, old, precision=_HIGHEST)
  estimates = jnp.sum(old * images, axis=1)
  order = jnp.argsort(-estimates, axis=1)[:, None, :]
  start = jnp.take_along_axis(images + _RIDGE * old, order, axis=2)
  vectors = decompositions.orthonormal(start)
  return _checked(factors, vectors, old)


def overlaps(new: jax.Array, old: jax.Array) -> jax.Array:
  """Squared cosines [M, b, b] between directions of two bases: [m, new, old].

  Rows sum to 1. What they do to second moments, for coordinates whose signs are
  independent: E[(sum_i r_i x_i)^2] = sum_i r_i^2 E[x_i^2]. A basis that was
  only put in another order permutes them.

  Args:
    new: [M, b, b].
    old: [M, b, b].
  """
  cosines = jnp.einsum("mij,mik->mjk", new, old, precision=_HIGHEST)
  return jnp.square(cosines)


def _scaled(factors: jax.Array) -> jax.Array:
  """Factors with diagonals of at most 1, so that no product overflows."""
  top = jnp.max(
    jnp.diagonal(factors, axis1=-2, axis2=-1), axis=-1, keepdims=True
  )[:, :, None]
  scaled = factors / jnp.where(top > 0.0, top, 1.0)
  return jnp.where(jnp.isfinite(scaled), scaled, 0.0)


def _checked(factors: jax.Array, vectors: jax.Array, old: jax.Array) -> Bases:
  gram = jnp.einsum("mij,mik->mjk", vectors, vectors, precision=_HIGHEST)
  eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
  gap = jnp.max(jnp.abs(gram - eye), axis=(-2, -1))
  finite = jnp.all(jnp.isfinite(factors), axis=(-2, -1))
  good = finite & (gap <= _LEAST_ORTHOGONAL)
  seen = jnp.any(factors != 0.0, axis=(-2, -1))
  used = (good & seen)[:, None, None]
  return Bases(jnp.where(used, vectors, old), seen & ~good)
