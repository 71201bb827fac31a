"""How layers meet their weights: what taps need to know of each kind of layer.

Shapes: d and p the weight's input and output width, V vocabulary.
"""

from collections.abc import Callable, Hashable
import dataclasses
from typing import Any

import flax.linen as nn
from flax.linen import dtypes
import jax
import jax.numpy as jnp

KINDS = ("product", "lookup", "attend")

# Ids travel as float32, which counts exactly up to here.
_MOST_IDS = 2**24


@dataclasses.dataclass(frozen=True)
class LayerRule:
  """How one method of one Flax layer meets its weight.

  A rule is a promise: with A = flatten(input) and Y the output, both seen as
  matrices, Y is A @ W ("product"), A @ W^T ("attend") or the rows A of W
  ("lookup"), plus what does not depend on W; row by row in the same order.
  Nothing can see from outside whether a rule keeps it, but
  `methods.check_against_vmap` measures.

  Attributes:
    weight: name of the parameter.
    kind: one of `KINDS`.
    flatten: (module, input) -> the input as [..., d] of what meets the weight,
      or ids [...] for a lookup; None to leave the call alone.
    num_features: module -> how many trailing axes of the output are features.
    view: module -> what `flatten` depends on beside the input; two layers with
      equal views keep one copy of an input that both get. None: no sharing.
  """

  weight: str
  kind: str
  flatten: Callable[[Any, jax.Array], jax.Array | None]
  num_features: Callable[[Any], int] = lambda module: 1
  view: Callable[[Any], Hashable] = lambda module: None

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(
        f"LayerRule.kind={self.kind!r} is unknown; use one of {KINDS}."
      )


def _dense_inputs(module: Any, x: jax.Array) -> jax.Array | None:
  return _as_met(module, x) if _is_plain(module) else None


def _dense_general_inputs(module: Any, x: jax.Array) -> jax.Array | None:
  if not _is_plain(module) or tuple(_axes(module.batch_dims)):
    return None
  axes = [axis % x.ndim for axis in _axes(module.axis)]
  if axes != sorted(axes):
    return None
  met = _as_met(module, x)
  if met is None:
    return None
  rest = [axis for axis in range(x.ndim) if axis not in axes]
  moved = jnp.transpose(met, (*rest, *axes))
  return moved.reshape(*_shape_of(x, rest), _size_of(x, axes))


def _attend_inputs(module: Any, x: jax.Array) -> jax.Array | None:
  return _as_met(module, x) if _is_plain(module) else None


def _ids(module: Any, ids: jax.Array) -> jax.Array | None:
  rows = module.num_embeddings
  if not _is_plain(module) or rows > _MOST_IDS:
    return None
  if rows == 1:  # Flax then never looks at the ids
    return jnp.zeros(ids.shape, jnp.int32)
  limits = jnp.iinfo(ids.dtype)
  ids = jnp.clip(ids, max(limits.min, -rows - 1), min(limits.max, rows))
  ids = ids.astype(jnp.int32)
  # -1 is the last row; what is out of range belongs to none.
  ids = jnp.where(ids < 0, ids + rows, ids)
  return jnp.where(ids < 0, rows, ids)


def _is_plain(module: Any) -> bool:
  """Whether the layer multiplies by its very weight."""
  standard = dtypes.promote_dtype
  return (
    getattr(module, "promote_dtype", standard) is standard
    and not getattr(module, "dot_general", None)
    and not getattr(module, "dot_general_cls", None)
  )


def _as_met(module: Any, x: jax.Array) -> jax.Array | None:
  """The input as narrow as the layer makes it; None if it is complex."""
  x = jnp.asarray(x)
  dtype = module.dtype if module.dtype is not None else module.param_dtype
  if any(jnp.issubdtype(t, jnp.complexfloating) for t in (x.dtype, dtype)):
    return None
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x.astype(jnp.promote_types(dtype, jnp.float32))
  narrower = jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits
  return x.astype(dtype) if module.dtype is not None and narrower else x


def _axes(value: Any) -> tuple[int, ...]:
  return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _shape_of(x: jax.Array, axes: list[int]) -> tuple[int, ...]:
  return tuple(x.shape[axis] for axis in axes)


def _size_of(x: jax.Array, axes: list[int]) -> int:
  size = 1
  for axis in axes:
    size *= x.shape[axis]
  return size


RULES: dict[tuple[type, str], LayerRule] = {
  (nn.Dense, "__call__"): LayerRule(
    "kernel",
    "product",
    _dense_inputs,
    view=lambda module: ((-1,), str(module.dtype)),
  ),
  (nn.DenseGeneral, "__call__"): LayerRule(
    "kernel",
    "product",
    _dense_general_inputs,
    lambda module: len(_axes(module.features)),
    lambda module: (_axes(module.axis), str(module.dtype)),
  ),
  (nn.Embed, "__call__"): LayerRule("embedding", "lookup", _ids),
  (nn.Embed, "attend"): LayerRule("embedding", "attend", _attend_inputs),
}


def matching(context: Any, args: Any, kwargs: Any) -> LayerRule | None:
  """The rule of an intercepted call, None if it has none."""
  rule = RULES.get((type(context.module), context.method_name))
  if rule is None or len(args) != 1 or kwargs:
    return None
  return rule if hasattr(args[0], "shape") else None
