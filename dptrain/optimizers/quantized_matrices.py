"""Positive semi-definite matrices in 8 or 16 bits per entry.

A matrix A becomes its diagonal in full and round(127 C) or round(32767 C) of
C_ij = A_ij / sqrt(A_ii A_jj), which lies in [-1, 1]: it stays symmetric, an
entry's error is relative to what its row and column allow, and zeros stay.

Rounding errors of C are about uniform and independent, so that their matrix has
a spectral norm of about 2 sqrt(b / 12) steps (`spread`): a packed matrix whose
smallest eigenvalues are below that may not be positive definite any more.

Shapes: M matrices of size b x b.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DTYPES = {8: jnp.int8, 16: jnp.int16}


class Quantized(NamedTuple):
  """A stack of matrices.

  Attributes:
    codes: [M, b, b] int8 or int16, zero on the diagonal.
    diagonal: [M, b].
  """

  codes: jax.Array
  diagonal: jax.Array


def check_bits(name: str, bits: int, allowed: tuple[int, ...]) -> None:
  """Raises ValueError unless `bits` is one of those allowed."""
  if bits not in allowed:
    raise ValueError(f"{name}={bits!r} must be one of {allowed}")


def spread(size: int, bits: int) -> float:
  """Norm of the rounding errors of C for size b; 0 for 32 bits.

  Args:
    size: b.
    bits: 8, 16 or 32.

  >>> round(spread(1024, 8), 3)
  0.145
  """
  if bits == 32:
    return 0.0
  return 2.0 * math.sqrt(size / 12.0) / int(jnp.iinfo(DTYPES[bits]).max)


def packed(matrices: jax.Array, bits: int) -> Any:
  """Quantises a stack [M, b, b]; 32 bits return it as it is.

  Args:
    matrices: positive semi-definite.
    bits: 8, 16 or 32.
  """
  if bits == 32:
    return matrices
  diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
  scale = _inverse(jnp.sqrt(jnp.maximum(diagonal, 0.0)))
  # One factor at a time: the product of two scales may overflow.
  c = matrices * scale[:, :, None] * scale[:, None, :]
  top = jnp.iinfo(DTYPES[bits]).max
  codes = jnp.round(jnp.clip(c, -1.0, 1.0) * top)
  codes *= 1.0 - jnp.eye(matrices.shape[-1], dtype=codes.dtype)
  return Quantized(codes.astype(DTYPES[bits]), diagonal)


def unpacked(matrices: Any, definite: bool = False) -> jax.Array:
  """The stack [M, b, b] that was packed, up to rounding.

  Args:
    matrices: what `packed` returned.
    definite: make up for rounding by 1 + `spread` times the diagonal.
  """
  if not isinstance(matrices, Quantized):
    return matrices
  codes, diagonal = matrices
  top = jnp.iinfo(codes.dtype).max
  scale = jnp.sqrt(jnp.maximum(diagonal, 0.0))
  c = codes.astype(diagonal.dtype) / top
  whole = c * scale[:, :, None] * scale[:, None, :]
  eye = jnp.eye(codes.shape[-1], dtype=diagonal.dtype)
  if definite:
    bits = jnp.iinfo(codes.dtype).bits
    diagonal = diagonal * (1.0 + spread(codes.shape[-1], bits))
  return whole + diagonal[:, :, None] * eye


def _inverse(x: jax.Array) -> jax.Array:
  """1 / x, and 0 where x is 0."""
  return jnp.where(x > 0.0, 1.0 / jnp.where(x > 0.0, x, 1.0), 0.0)
