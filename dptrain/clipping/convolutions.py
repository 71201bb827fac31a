"""How `flax.linen.Conv` meets its kernel: as a product with patches.

Shapes: k* the kernel's extents, c input channels, d = prod(k*) * c.
"""

from collections.abc import Hashable
import itertools
import math
from typing import Any

from flax.linen import linear
import jax
import jax.numpy as jnp

from dptrain.clipping import dense_layers


def patches(module: Any, x: jax.Array) -> jax.Array | None:
  """What the kernel [k*, c, p] meets at each place of the output: [..., d].

  Cut out by slices, so exact in any dtype, in the order of the kernel's axes.
  None for masked or grouped kernels, which are no product with all channels.
  """
  if (
    module.mask is not None
    or module.feature_group_count != 1
    or not dense_layers.is_plain(module)
  ):
    return None
  met = dense_layers.as_met(module, x)
  if met is None:
    return None
  extents, strides, dilations = _geometry(module)
  rank = len(extents)
  lead = met.shape[: met.ndim - rank - 1]
  met = met.reshape(math.prod(lead), *met.shape[met.ndim - rank - 1 :])
  wide = [(k - 1) * d + 1 for k, d in zip(extents, dilations, strict=True)]
  met = _padded(module, met, wide, strides)
  spatial = met.shape[1:-1]
  counts = [
    max(0, (n - w) // s + 1)
    for n, w, s in zip(spatial, wide, strides, strict=True)
  ]
  if not all(counts):
    return None
  parts = []
  for place in itertools.product(*map(range, extents)):
    first = [o * d for o, d in zip(place, dilations, strict=True)]
    last = [
      f + (n - 1) * s + 1
      for f, n, s in zip(first, counts, strides, strict=True)
    ]
    parts.append(
      jax.lax.slice(
        met,
        (0, *first, 0),
        (met.shape[0], *last, met.shape[-1]),
        (1, *strides, 1),
      )
    )
  joined = jnp.concatenate(parts, axis=-1)
  return joined.reshape(*lead, *joined.shape[1:])


def view(module: Any) -> Hashable:
  """What `patches` depends on beside the input."""
  return (
    *_geometry(module),
    _tuple(module.input_dilation, len(_extents(module))),
    str(module.padding),
    str(module.dtype),
  )


def _padded(
  module: Any, x: jax.Array, wide: list[int], strides: tuple[int, ...]
) -> jax.Array:
  """The input [b, n*, c] with zeros, or itself, around and between."""
  rank = len(wide)
  padding = linear.canonicalize_padding(module.padding, rank)
  if padding in ("CIRCULAR", "REFLECT"):
    mode = "wrap" if padding == "CIRCULAR" else "reflect"
    around = [((w - 1) // 2, w // 2) for w in wide]
    x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode=mode)
    padding = "VALID"
  elif padding == "CAUSAL":
    # Before the input is dilated, as Flax does.
    x = jnp.pad(x, [(0, 0), (wide[0] - 1, 0), (0, 0)])
    padding = "VALID"
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:-1], wide, strides, padding)
  between = _tuple(module.input_dilation, rank)
  config = [
    (low, high, d - 1) for (low, high), d in zip(padding, between, strict=True)
  ]
  zero = jnp.zeros((), x.dtype)
  return jax.lax.pad(x, zero, [(0, 0, 0), *config, (0, 0, 0)])


def _extents(module: Any) -> tuple[int, ...]:
  return tuple(dense_layers.axes_of(module.kernel_size))


def _geometry(module: Any) -> tuple[tuple[int, ...], ...]:
  """The kernel's extents, its strides and its dilations."""
  extents = _extents(module)
  others = module.strides, module.kernel_dilation
  return (extents, *(_tuple(value, len(extents)) for value in others))


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
  value = 1 if value is None else value
  return (value,) * rank if isinstance(value, int) else tuple(value)
