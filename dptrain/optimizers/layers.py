"""What counts as one layer, for norms and second moments taken per layer.

A model that scans over its layers keeps the weights of all of them in one
array [layers, ...]. A norm of that array would mix the layers, and an optimizer
would do one thing to a stacked model and another to the same model unstacked.
So arrays below the name `STACKED` count as one layer per leading index.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

# Flax's customary name, and that of `dptrain.models`, for scanned layers. Those
# of a loop are called "layers_0" and so on.
STACKED = "layers"


def depth(path: tuple[Any, ...], leaf: Any, stacked: str | None) -> int:
  """How many leading dimensions of a parameter number layers: 0 or 1.

  Args:
    path: of the parameter, as `jax.tree_util` gives it.
    leaf: the parameter, or anything of its shape.
    stacked: the name below which arrays are stacks of layers; None: nothing is.
  """
  names = [jax.tree_util.keystr((key,), simple=True) for key in path]
  return int(stacked is not None and stacked in names and leaf.ndim > 0)


def map_with_depth(
  function: Callable[..., Any],
  tree: Any,
  *rest: Any,
  stacked: str | None = STACKED,
) -> Any:
  """Maps `function(depth, leaf, *others)` over trees of one structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf, *others: function(
      depth(path, leaf, stacked), leaf, *others
    ),
    tree,
    *rest,
  )


def norms(tree: Any, stacked: str | None = STACKED) -> Any:
  """L2 norms per layer, each in a shape that broadcasts to its array.

  Neither huge nor tiny entries lose their squares: privatised gradients of a
  small clip norm over a large batch have entries whose squares leave float32.

  Args:
    tree: a pytree of arrays.
    stacked: see `depth`.

  Returns:
    A pytree of float32 arrays (float64 where given float64) of the ranks given,
    [1, ..., 1] or [layers, 1, ..., 1].

  >>> tree = {"layers": {"kernel": jnp.ones((2, 3, 3))}, "bias": jnp.ones(4)}
  >>> jax.tree.map(lambda n: n.ravel().tolist(), norms(tree))
  {'bias': [2.0], 'layers': {'kernel': [3.0, 3.0]}}
  """
  return map_with_depth(
    lambda deep, leaf: _norm(leaf, range(deep, leaf.ndim)),
    tree,
    stacked=stacked,
  )


def global_norm(tree: Any) -> jax.Array:
  """The L2 norm of all arrays of a tree as one vector, as exact as `norms`."""
  whole = [n.reshape(()) for n in jax.tree.leaves(norms(tree, stacked=None))]
  return _norm(jnp.stack([jnp.zeros(()), *whole]), range(1)).reshape(())


def trust_ratios(
  params: Any, updates: Any, adapts: Any, stacked: str | None = STACKED
) -> Any:
  """Norm of the parameters over that of their updates, layer by layer.

  Args:
    params: a pytree of arrays.
    updates: likewise.
    adapts: of bools: False gives the ratio 1.
    stacked: see `depth`.

  Returns:
    Arrays that broadcast; 1 where a norm is 0, so that a weight that starts at
    0 can leave it.
  """

  def ratio(weight: jax.Array, update: jax.Array, wanted: bool) -> jax.Array:
    usable = (weight > 0) & (update > 0)
    found = jnp.where(usable, weight / jnp.where(usable, update, 1), 1)
    return found if wanted else jnp.ones_like(found)

  return jax.tree.map(
    ratio, norms(params, stacked), norms(updates, stacked), adapts
  )


def memory(state: Any) -> int:
  """How many numbers the arrays of a state hold; shapes will do.

  >>> memory({"a": jax.ShapeDtypeStruct((2, 3), "float32")})
  6
  """
  return sum(math.prod(x.shape) for x in jax.tree.leaves(state))


def _norm(x: jax.Array, axes: range) -> jax.Array:
  """The norm over `axes`, kept as dimensions of 1, in at least float32."""
  over = tuple(axes)
  wide = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
  largest = jnp.max(wide, axis=over, keepdims=True, initial=0.0)
  # An infinite entry makes the norm infinite, not nan.
  unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
  return unit * jnp.sqrt(
    jnp.sum(jnp.square(wide / unit), axis=over, keepdims=True)
  )
