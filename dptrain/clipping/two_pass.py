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
  """As `methods.clipped_sum`, which see, for tapped layers `uses`.

  Raises:
    ValueError: the rule clips by groups: one weight per example cannot.
  """
  if rule.groups is not None:
    raise ValueError(
      "the two_pass method scales each example's loss once and so cannot clip"
      " groups of parameters; use method 'one_pass' or 'vmap', or groups=None."
    )
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
  each, zeros = taps.sum_zeros(uses, clip.scales, shapes)
  # An example that is not finite would spoil the pass even with weight 0: one
  # that is stands in for it.
  stand_in = jnp.argmax(clip.finite)
  chosen = jnp.where(clip.finite, jnp.arange(keys.shape[0]), stand_in)

  def summed(zeros: Any) -> jax.Array:
    def one(each: Any, example: Any, key: jax.Array) -> jax.Array:
      tree = parameter_trees.with_leaves(params, {**each, **zeros})
      with taps.tapped():
        batch_of_one = jax.tree.map(lambda x: x[None], example)
        return loss_fn(tree, batch_of_one, key[None])[0][0]

    taken = jax.tree.map(lambda x: jnp.asarray(x)[chosen], batch)
    return jnp.sum(jax.vmap(one)(each, taken, keys[chosen]))

  sums = jax.grad(summed)(zeros)
  any_finite = jnp.any(clip.finite)
  return {
    path: jnp.where(any_finite, g, 0).reshape(shapes[path])
    for path, g in (
      (w, sums[taps.sum_path(w)]) for w in {u.weight for u in uses}
    )
  }
