"""Per-example gradients kept as factors: the work of the one-pass method.

One forward and one backward pass (arXiv 2210.00038) leave, for each tapped
weight, the inputs and output gradients of its layers, from which follow both
the norms and, once these are known, the clipped sum. Every other parameter
(biases, scales, weights used in ways that no tap covers) is given a copy per
example, whose gradient is the per-example gradient.

Shapes: B batch; P* the shape of a parameter.
"""

import collections
from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.clipping import parameter_trees
from dptrain.clipping import per_example
from dptrain.clipping import products
from dptrain.clipping import taps

Path = taps.Path


class Kept(NamedTuple):
  """What one backward pass leaves behind.

  Attributes:
    own: per-example gradients [B, P*] of parameters without taps.
    seen: factors of the gradients of tapped weights, by use.
    losses: [B].
    aux: what the loss function returned beside the losses.
  """

  own: dict[Path, jax.Array]
  seen: dict[tuple[Path, int], taps.Captured]
  losses: jax.Array
  aux: Any


def backward(
  loss_fn: Callable[..., Any],
  params: Any,
  batch: Any,
  keys: jax.Array,
  uses: tuple[taps.Use, ...],
) -> Kept:
  """One forward and one backward pass with taps on `uses`.

  Each example runs under `jax.vmap` as a batch of one, with its own key: it
  draws the dropout that it would draw alone.
  """
  own, handed_out, losses, aux = _differentiate(
    loss_fn, params, batch, keys, uses, taps.tap_shapes(uses)
  )
  return Kept(own, taps.captured(uses, handed_out), losses, aux)


def backward_to_squares(
  loss_fn: Callable[..., Any],
  params: Any,
  batch: Any,
  keys: jax.Array,
  uses: tuple[taps.Use, ...],
  single: set[Path],
) -> tuple[Kept, dict[Path, jax.Array]]:
  """As `backward`, but weights of one use leave only their squared norms.

  Args:
    loss_fn: per-example losses.
    params: tree of arrays P*.
    batch: tree of arrays [B, ...].
    keys: typed PRNG keys [B].
    uses: the tapped uses.
    single: weights of one use.

  Returns:
    Losses with per-example gradients of untapped parameters, and the squared
    norms [B] of every parameter's gradient.
  """
  several = taps.sharing_within(
    tuple(use for use in uses if use.weight not in single)
  )
  alone = tuple(use for use in uses if use.weight in single)
  own, handed_out, losses, aux = _differentiate(
    loss_fn,
    params,
    batch,
    keys,
    uses,
    taps.tap_shapes((*alone, *several), single),
  )
  kept = Kept(own, taps.captured(several, handed_out), losses, aux)
  squares = squared_norms(several, kept)
  for weight in single:
    # The layers of a scan are one parameter.
    by_layer = handed_out[taps.squares_path(weight)]
    squares[weight] = by_layer.reshape(keys.shape[0], -1).sum(axis=1)
  return kept, squares


def _differentiate(
  loss_fn: Callable[..., Any],
  params: Any,
  batch: Any,
  keys: jax.Array,
  uses: tuple[taps.Use, ...],
  shapes: Mapping[Path, tuple[tuple[int, ...], Any]],
) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array], jax.Array, Any]:
  """Gradients of copies per example and of taps; losses; aux."""
  flat = parameter_trees.leaves_by_path(params)
  tapped = {use.weight for use in uses}
  size = keys.shape[0]
  fixed = {path: leaf for path, leaf in flat.items() if path in tapped}
  own = {
    path: jnp.broadcast_to(leaf, (size, *leaf.shape))
    for path, leaf in flat.items()
    if path not in tapped
  }
  zeros = {
    path: jnp.zeros((size, *shape), dtype)
    for path, (shape, dtype) in shapes.items()
  }

  def one(own: Any, zeros: Any, example: Any, key: jax.Array) -> Any:
    tree = parameter_trees.with_leaves(params, {**fixed, **own, **zeros})
    with taps.tapped():
      losses, aux = loss_fn(
        tree, jax.tree.map(lambda x: x[None], example), key[None]
      )
    return losses[0], jax.tree.map(lambda x: x[0], aux)

  def total(own: Any, zeros: Any) -> Any:
    losses, aux = jax.vmap(one)(own, zeros, batch, keys)
    return jnp.sum(losses), (losses, aux)

  (own, handed_out), (losses, aux) = jax.grad(
    total, argnums=(0, 1), has_aux=True
  )(own, zeros)
  # Norms and sums must see the same numbers: a compiler that fuses both with
  # this pass may skip the rounding to bfloat16 for one of them.
  own, handed_out = jax.lax.optimization_barrier((own, handed_out))
  return own, handed_out, losses, aux


def kept_elements(uses: tuple[taps.Use, ...]) -> collections.Counter[Path]:
  """How many numbers per example the factors of each weight are.

  An input that layers share counts for the first of them.
  """
  kept: collections.Counter[Path] = collections.Counter()
  for use in uses:
    inputs = math.prod(use.inputs) if use.same_inputs is None else 0
    outputs = math.prod(use.outputs)
    kept[use.weight] += math.prod(use.stack) * (inputs + outputs)
  return kept


def squared_norms(
  uses: tuple[taps.Use, ...], kept: Kept
) -> dict[Path, jax.Array]:
  """Squared norms [B] of each parameter's gradient, example by example."""
  squares = {path: per_example.squares(g) for path, g in kept.own.items()}
  grams: dict[tuple[Path, int], jax.Array] = {}
  for path, by_kind in _uses_by_weight(uses).items():
    squares[path] = _weight_squares(by_kind, kept.seen, grams)
  return squares


def weighted_sum(
  uses: tuple[taps.Use, ...],
  kept: Kept,
  scales: Mapping[Path, jax.Array],
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[Path, jax.Array]:
  """Sums over examples of gradients times factors.

  Args:
    uses: the tapped uses.
    kept: what `backward` left; it must be finite.
    scales: [B] factors of each parameter.
    shapes: P* of each tapped weight.

  Returns:
    Arrays P*, at least float32.
  """
  total = {
    path: per_example.contraction(scales[path], g)
    for path, g in kept.own.items()
  }
  tapped = {}
  for path, by_kind in _uses_by_weight(uses).items():
    rows = shapes[path][-2] if by_kind["lookup"] else 0
    tapped[path] = _weight_sum(scales[path], by_kind, kept.seen, rows)
  return total | in_shape(uses, tapped, shapes)


def in_shape(
  uses: tuple[taps.Use, ...],
  gradients: Mapping[Path, jax.Array],
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[Path, jax.Array]:
  """Gradients [S, d, p] of tapped weights in the weights' own shapes P*.

  Args:
    uses: those of the weights.
    gradients: by weight.
    shapes: P* by weight.
  """
  orders = {use.weight: use.weight_order for use in uses}
  result = {}
  for path, g in gradients.items():
    shape, order = shapes[path], orders[path]
    if order is None:
      result[path] = g.reshape(shape)
      continue
    depth = len(shape) - len(order)
    axes = [*range(depth), *(depth + axis for axis in order)]
    moved = g.reshape([shape[axis] for axis in axes])
    result[path] = jnp.transpose(moved, np.argsort(axes).tolist())
  return result


def _uses_by_weight(
  uses: tuple[taps.Use, ...],
) -> dict[Path, dict[str, list[taps.Use]]]:
  weights: dict[Path, dict[str, list[taps.Use]]] = {}
  for use in uses:
    kinds: dict[str, list[taps.Use]] = {
      "product": [],
      "lookup": [],
      "attend": [],
    }
    weights.setdefault(use.weight, kinds)[use.kind].append(use)
  return weights


def _factors(
  uses: list[taps.Use], seen: Mapping[tuple[Path, int], taps.Captured]
) -> tuple[jax.Array, jax.Array]:
  """Factors of all `uses` of one weight, as of one use.

  Y = A W^T is to W what Y^T = W A^T is: its factors change sides.
  """
  pairs = [
    seen[use.name][::-1] if use.kind == "attend" else seen[use.name]
    for use in uses
  ]
  left, right = zip(*pairs, strict=True)
  return products.joined(left), products.joined(right)


def _weight_squares(
  by_kind: Mapping[str, list[taps.Use]],
  seen: Mapping[tuple[Path, int], taps.Captured],
  grams: dict[tuple[Path, int], jax.Array],
) -> jax.Array:
  """Squared norms [B]; `grams` keeps those of inputs that layers share."""
  total: Any = 0.0
  uses = by_kind["product"] + by_kind["attend"]
  if uses:
    left, right = _factors(uses, seen)
    total += _product_squares(uses, left, right, grams)
  if by_kind["lookup"]:
    ids, gradients = _factors(by_kind["lookup"], seen)
    total += products.lookup_squares(ids, gradients)
    if uses:
      crossed = products.lookup_attend_products(ids, gradients, right, left)
      total += 2.0 * crossed
  return jnp.maximum(total, 0.0)


def _product_squares(
  uses: list[taps.Use],
  left: jax.Array,
  right: jax.Array,
  grams: dict[tuple[Path, int], jax.Array],
) -> jax.Array:
  attended = any(use.kind == "attend" for use in uses)
  # A gradient of the size of the vocabulary is never formed.
  if not attended and not products.prefers_gram(
    left.shape[2], left.shape[3], right.shape[3]
  ):
    return products.product_squares(left, right)
  if attended or len(uses) > 1:
    return products.gram_squares(products.gram(left), products.gram(right))
  name = uses[0].same_inputs or uses[0].name
  if name not in grams:
    grams[name] = products.gram(left)
  return products.gram_squares(grams[name], products.gram(right))


def _weight_sum(
  scales: jax.Array,
  by_kind: Mapping[str, list[taps.Use]],
  seen: Mapping[tuple[Path, int], taps.Captured],
  rows: int,
) -> jax.Array:
  """Weighted gradient of one weight, with its stacked layers in front."""
  parts = []
  if by_kind["lookup"]:
    ids, gradients = _factors(by_kind["lookup"], seen)
    parts.append(products.weighted_lookup(scales, ids, gradients, rows))
  uses = by_kind["product"] + by_kind["attend"]
  if uses:
    parts.append(products.weighted_product(scales, *_factors(uses, seen)))
  return sum(parts[1:], start=parts[0])
