"""How layers meet their weights: what taps need to know of each kind of layer.

Shapes: d and p the weight's input and output width.
"""

from collections.abc import Callable, Hashable
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dptrain.clipping import convolutions
from dptrain.clipping import dense_layers
from dptrain.clipping import einsum_layers

KINDS = ("product", "lookup", "attend")

# A permutation of axes; None: as they are.
Order = tuple[int, ...] | None


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
    num_features: module -> how many axes of the output are features: the last
      ones, unless `output_order` says otherwise.
    view: module -> what `flatten` depends on beside the input; two layers with
      equal views keep one copy of an input that both get. None: no sharing.
    output_order: (module, rank of the output) -> the output's axes in the order
      rows, features.
    weight_order: module -> the weight's axes in the order d, p, for a product.
  """

  weight: str
  kind: str
  flatten: Callable[[Any, jax.Array], jax.Array | None]
  num_features: Callable[[Any], int] = lambda module: 1
  view: Callable[[Any], Hashable] = lambda module: None
  output_order: Callable[[Any, int], Order] = lambda module, rank: None
  weight_order: Callable[[Any], Order] = lambda module: None

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(
        f"LayerRule.kind={self.kind!r} is unknown; use one of {KINDS}."
      )

  def output_rows(self, module: Any, y: jax.Array) -> jax.Array:
    """The output as [..., p]."""
    order = self.output_order(module, y.ndim)
    if order is not None:
      y = jnp.transpose(y, order)
    lead = y.shape[: y.ndim - self.num_features(module)]
    return y.reshape(*lead, math.prod(y.shape[len(lead) :]))

  def output_of(
    self, module: Any, rows: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    """Undoes `output_rows`, for an output of the given shape."""
    order = self.output_order(module, len(shape))
    if order is None:
      return rows.reshape(shape)
    moved = rows.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, np.argsort(order).tolist())


RULES: dict[tuple[type, str], LayerRule] = {
  (nn.Dense, "__call__"): LayerRule(
    "kernel",
    "product",
    dense_layers.dense,
    view=lambda module: ((-1,), str(module.dtype)),
  ),
  (nn.DenseGeneral, "__call__"): LayerRule(
    "kernel",
    "product",
    dense_layers.dense_general,
    lambda module: len(dense_layers.axes_of(module.features)),
    lambda module: (dense_layers.axes_of(module.axis), str(module.dtype)),
  ),
  (nn.Einsum, "__call__"): LayerRule(
    "kernel",
    "product",
    einsum_layers.inputs,
    einsum_layers.num_features,
    lambda module: (module.einsum_str, str(module.dtype)),
    einsum_layers.output_order,
    einsum_layers.weight_order,
  ),
  (nn.Conv, "__call__"): LayerRule(
    "kernel", "product", convolutions.patches, view=convolutions.view
  ),
  (nn.Embed, "__call__"): LayerRule("embedding", "lookup", dense_layers.ids),
  (nn.Embed, "attend"): LayerRule("embedding", "attend", dense_layers.dense),
}


def matching(context: Any, args: Any, kwargs: Any) -> LayerRule | None:
  """The rule of an intercepted call, None if it has none."""
  rule = RULES.get((type(context.module), context.method_name))
  if rule is None or len(args) != 1 or kwargs:
    return None
  return rule if hasattr(args[0], "shape") else None
