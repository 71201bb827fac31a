"""How Dense, DenseGeneral and Embed meet their weights.

Shapes: d the weight's input width.
"""

import math
from typing import Any

from flax.linen import dtypes
import jax
import jax.numpy as jnp

# Ids travel as float32, which counts exactly up to here.
_MOST_IDS = 2**24


def is_plain(module: Any) -> bool:
  """Whether the layer multiplies by its very weight."""
  standard = dtypes.promote_dtype
  return getattr(module, "promote_dtype", standard) is standard and not any(
    getattr(module, name, None)
    for name in (
      "dot_general",
      "dot_general_cls",
      "conv_general_dilated",
      "conv_general_dilated_cls",
    )
  )


def as_met(module: Any, x: jax.Array) -> jax.Array | None:
  """The input as narrow as the layer makes it; None if it is complex."""
  x = jnp.asarray(x)
  dtype = module.dtype if module.dtype is not None else module.param_dtype
  if any(jnp.issubdtype(t, jnp.complexfloating) for t in (x.dtype, dtype)):
    return None
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x.astype(jnp.promote_types(dtype, jnp.float32))
  narrower = jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits
  return x.astype(dtype) if module.dtype is not None and narrower else x


def dense(module: Any, x: jax.Array) -> jax.Array | None:
  """The input of `Dense`, or of `Embed.attend`: [..., d]."""
  return as_met(module, x) if is_plain(module) else None


def dense_general(module: Any, x: jax.Array) -> jax.Array | None:
  """The input of `DenseGeneral`, its axes joined into one: [..., d]."""
  if not is_plain(module) or axes_of(module.batch_dims):
    return None
  axes = [axis % x.ndim for axis in axes_of(module.axis)]
  if axes != sorted(axes):
    return None
  met = as_met(module, x)
  if met is None:
    return None
  rest = [axis for axis in range(x.ndim) if axis not in axes]
  moved = jnp.transpose(met, (*rest, *axes))
  lead = [x.shape[axis] for axis in rest]
  return moved.reshape(*lead, math.prod(x.shape[axis] for axis in axes))


def ids(module: Any, ids: jax.Array) -> jax.Array | None:
  """The rows that `Embed` looks up: int32 [...]."""
  rows = module.num_embeddings
  if not is_plain(module) or rows > _MOST_IDS:
    return None
  if rows == 1:  # Flax then never looks at the ids
    return jnp.zeros(ids.shape, jnp.int32)
  limits = jnp.iinfo(ids.dtype)
  ids = jnp.clip(ids, max(limits.min, -rows - 1), min(limits.max, rows))
  ids = ids.astype(jnp.int32)
  # -1 is the last row; what is out of range belongs to none.
  ids = jnp.where(ids < 0, ids + rows, ids)
  return jnp.where(ids < 0, rows, ids)


def axes_of(value: Any) -> tuple[int, ...]:
  """One axis or several, as a tuple."""
  return tuple(value) if isinstance(value, (tuple, list)) else (value,)
