"""Clipped sums in two backward passes: ghost norms, least memory.

The first pass turns each layer's input and output gradient into a squared norm
as soon as they meet, so that neither is kept; the second differentiates the
re-weighted loss as plain training would (arXiv 2110.05679).

Shapes: B batch; P* the shape of a parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dptrain.clipping import book_keeping
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
  number = {weight: 0 for weight in (use.weight for use in uses)}
  for use in uses:
    number[use.weight] += 1
  single = {weight for weight, count in number.items() if count == 1}
  kept, squares = book_keeping.backward_to_squares(
    loss_fn, params, batch, keys, uses, single
  )
  clip = per_example.clip_factors(squares, kept.losses, is_padding, rule)
  scales = next(iter(clip.scales.values()))
  # An example that is not finite would spoil the pass even with weight 0: one
  # that is stands in for it.
  stand_in = jnp.argmax(clip.finite)
  chosen = jnp.where(clip.finite, jnp.arange(keys.shape[0]), stand_in)

  def weighted_loss(params: Any) -> jax.Array:
    def one(example: Any, key: jax.Array) -> jax.Array:
      batch_of_one = jax.tree.map(lambda x: x[None], example)
      return loss_fn(params, batch_of_one, key[None])[0][0]

    losses = jax.vmap(one)(
      jax.tree.map(lambda x: jnp.asarray(x)[chosen], batch), keys[chosen]
    )
    return jnp.sum(losses * scales)

  gradients = jax.grad(weighted_loss)(params)
  any_finite = jnp.any(clip.finite)
  gradients = jax.tree.map(
    lambda g: jnp.where(any_finite, g, jnp.zeros_like(g)).astype(
      jnp.promote_types(g.dtype, jnp.float32)
    ),
    gradients,
  )
  return per_example.ClippedSum(
    gradients, kept.losses, clip.norms, clip.contributes, kept.aux
  )
