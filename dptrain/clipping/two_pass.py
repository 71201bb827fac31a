"""Clipped sums in two backward passes: ghost norms, least memory.

The first pass turns each layer's input and output gradient into a squared norm
as soon as they meet, so that neither is kept; the second adds up the weighted
gradients (arXiv 2110.05679). Differentiating the re-weighted loss
would do for that in exact arithmetic; but in bfloat16 the sum over the batch
would be rounded more coarsely than the norms. So taps add up, in the second
pass, the same factors from which the norms were taken.

Shapes: B batch; P* the shape of a parameter.
"""

import collections
from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.clipping import book_keeping
from dptrain.clipping import parameter_trees
from dptrain.clipping import per_example
from dptrain.clipping import rules
from dptrain.clipping import taps


def clipped_sum(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  is_padding: jax.Array,
  rule: rules.ClippingRule,
  uses: tuple[taps.Use, ...],
) -> per_example.ClippedSum:
  """As `methods.clipped_sum`, which see, for tapped layers `uses`."""
  kept, squares = first_pass(loss_fn, params, batch, keys, uses)
  clip = per_example.clip_factors(squares, kept.losses, is_padding, rule)
  total = sums(loss_fn, params, batch, keys, uses, kept, clip)
  return per_example.ClippedSum(
    parameter_trees.like(params, total),
    kept.losses,
    clip.norms,
    clip.contributes,
    kept.aux,
  )


def first_pass(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  uses: tuple[taps.Use, ...],
) -> tuple[book_keeping.Kept, dict[taps.Path, jax.Array]]:
  """What `book_keeping.backward_to_squares` leaves and finds, which see."""
  number = collections.Counter(use.weight for use in uses)
  single = {weight for weight, count in number.items() if count == 1}
  return book_keeping.backward_to_squares(
    loss_fn, params, batch, keys, uses, single
  )


def sums(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  uses: tuple[taps.Use, ...],
  kept: book_keeping.Kept,
  clip: per_example.ClipFactors,
) -> dict[taps.Path, jax.Array]:
  """Sums over examples of weighted gradients P*, by path."""
  total = _own_sums(kept.own, clip)
  if uses:
    total |= _tapped_sums(loss_fn, params, batch, keys, uses, clip)
  return total


def _own_sums(
  own: Mapping[taps.Path, jax.Array], clip: per_example.ClipFactors
) -> dict[taps.Path, jax.Array]:
  """Sums of what the first pass has left anyway."""
  return {
    path: per_example.contraction(
      clip.scales[path],
      # 0 * inf is nan: what must not count is taken out, not scaled away.
      per_example.without(g, ~clip.finite),
    )
    for path, g in own.items()
  }


def _tapped_sums(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  uses: tuple[taps.Use, ...],
  clip: per_example.ClipFactors,
) -> dict[taps.Path, jax.Array]:
  """The second pass: arrays P* for the tapped weights."""
  flat = parameter_trees.leaves_by_path(params)
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  size = keys.shape[0]
  summed, factored = _split(uses, shapes, size)
  each, zeros = taps.sum_zeros(summed, clip.scales, shapes)
  factors = {
    path: jnp.zeros((size, *shape), dtype)
    for path, (shape, dtype) in taps.tap_shapes(factored).items()
  }
  # An example that is not finite would spoil the pass even with weight 0: one
  # that is stands in for it.
  stand_in = jnp.argmax(clip.finite)
  chosen = jnp.where(clip.finite, jnp.arange(size), stand_in)

  def total(zeros: Any, factors: Any) -> jax.Array:
    def one(each: Any, factors: Any, example: Any, key: jax.Array) -> jax.Array:
      tree = parameter_trees.with_leaves(params, {**each, **factors, **zeros})
      with taps.tapped():
        batch_of_one = jax.tree.map(lambda x: x[None], example)
        return loss_fn(tree, batch_of_one, key[None])[0][0]

    taken = jax.tree.map(lambda x: jnp.asarray(x)[chosen], batch)
    return jnp.sum(jax.vmap(one)(each, factors, taken, keys[chosen]))

  sums, handed_out = jax.grad(total, argnums=(0, 1))(zeros, factors)
  any_finite = jnp.any(clip.finite)
  found = {
    weight: jnp.where(any_finite, sums[taps.sum_path(weight)], 0)
    for weight in {use.weight for use in summed}
  }
  found = book_keeping.in_shape(summed, found, shapes)
  return found | _factored_sums(factored, handed_out, clip, shapes)


def _factored_sums(
  uses: tuple[taps.Use, ...],
  handed_out: Mapping[taps.Path, jax.Array],
  clip: per_example.ClipFactors,
  shapes: Mapping[taps.Path, tuple[int, ...]],
) -> dict[taps.Path, jax.Array]:
  """Weighted sums P* from factors that taps handed out."""
  if not uses:
    return {}

  def weighted(handed_out: Any) -> dict[taps.Path, jax.Array]:
    seen = taps.captured(uses, jax.lax.optimization_barrier(handed_out))
    kept = book_keeping.Kept({}, seen, clip.norms, None)
    return book_keeping.weighted_sum(uses, kept, clip.scales, shapes)

  # Behind a branch, for its operands are complete before it starts: else a
  # compiler may form the sum early and carry it through the pass.
  return jax.lax.cond(
    jnp.any(clip.finite),
    weighted,
    lambda x: jax.tree.map(jnp.zeros_like, jax.eval_shape(weighted, x)),
    dict(handed_out),
  )


def _split(
  uses: tuple[taps.Use, ...],
  shapes: Mapping[taps.Path, tuple[int, ...]],
  size: int,
) -> tuple[tuple[taps.Use, ...], tuple[taps.Use, ...]]:
  """Uses whose taps add up the weight's sum, and those that leave factors.

  Whichever is smaller is carried through the pass: for a vocabulary, of which
  few rows are read and predicted, that is the factors.
  """
  kept = book_keeping.kept_elements(uses)
  small = {w for w in kept if size * kept[w] < math.prod(shapes[w])}
  factored = tuple(use for use in uses if use.weight in small)
  summed = tuple(use for use in uses if use.weight not in small)
  return taps.sharing_within(summed), taps.sharing_within(factored)
