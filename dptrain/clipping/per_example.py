"""Clipped sums of per-example gradients, by vmap: the reference method.

Shapes: B batch; P* the shape of a parameter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dptrain.clipping import rules

# (params, batch, keys [B]) -> (losses [B], auxiliary tree of [B, ...]). Entry i
# may depend on row i and key i only.
PerExampleLoss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


class ClippedSum(NamedTuple):
  """A sum over examples, each bounded by the rule.

  Attributes:
    gradients: tree of the parameters' shapes, float32 (float64 for float64
      parameters): the sum of the clipped gradients.
    losses: [B], of single examples: private, not clipped.
    norms: [B] norms before clipping: private.
    contributes: [B] bool: neither a padding row nor non-finite.
    aux: what the loss function returned beside the losses: private.
  """

  gradients: Any
  losses: jax.Array
  norms: jax.Array
  contributes: jax.Array
  aux: Any


def clipped_sum(
  loss_fn: PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  is_padding: jax.Array,
  rule: rules.ClippingRule,
) -> ClippedSum:
  """Sums the clipped gradients of the examples of one physical batch.

  Each example's gradient with respect to *all* parameters is one vector; a
  parameter that is used twice (tied embeddings) appears in it once, with the
  sum of both gradients. Memory: B gradients at once (arXiv 2010.09063).

  Formal guarantee: one example moves `gradients` by at most `rule.sensitivity`
  in L2 norm. Padding rows contribute exactly zero, and so do examples whose
  gradient is not finite: whether an example is finite depends on it alone.

  Args:
    loss_fn: per-example losses, see `PerExampleLoss`.
    params: tree of arrays P*.
    batch: tree of arrays [B, ...].
    keys: typed PRNG keys [B].
    is_padding: [B] bool.
    rule: the clipping rule.

  Returns:
    The clipped sum and what was seen on the way.
  """

  def loss_of_one(
    params: Any, example: Any, key: jax.Array
  ) -> tuple[jax.Array, Any]:
    one = jax.tree.map(lambda x: x[None], example)
    losses, aux = loss_fn(params, one, key[None])
    return losses[0], jax.tree.map(lambda x: x[0], aux)

  (losses, aux), gradients = jax.vmap(
    jax.value_and_grad(loss_of_one, has_aux=True), in_axes=(None, 0, 0)
  )(params, batch, keys)
  norms = gradient_norms(gradients)
  finite = jnp.isfinite(norms) & jnp.isfinite(losses)
  contributes = finite & ~is_padding
  scales = jnp.where(contributes, rule.scales(jnp.where(finite, norms, 0.0)), 0)

  def weighted(gradients: Any) -> Any:
    return jax.tree.map(lambda g: _weighted_sum(scales, g), gradients)

  def weighted_finite(gradients: Any) -> Any:
    # 0 * inf is nan: what must not count has to be taken out, not scaled away.
    return weighted(
      jax.tree.map(
        lambda g: jnp.where(
          finite.reshape(-1, *[1] * (g.ndim - 1)), g, jnp.zeros_like(g)
        ),
        gradients,
      )
    )

  total = jax.lax.cond(jnp.all(finite), weighted, weighted_finite, gradients)
  return ClippedSum(total, losses, norms, contributes, aux)


def gradient_norms(gradients: Any) -> jax.Array:
  """L2 norms of per-example gradients over all leaves together.

  Args:
    gradients: tree of arrays [B, P*].

  Returns:
    [B] norms, at least float32.
  """
  squares = [
    jnp.sum(jnp.square(_at_least_float32(g)), axis=range(1, g.ndim))
    for g in jax.tree.leaves(gradients)
  ]
  return jnp.sqrt(sum(squares[1:], start=squares[0]))


def _weighted_sum(scales: jax.Array, gradients: jax.Array) -> jax.Array:
  # A contraction, not a product and a sum: jaxlib 0.10.2 computes the latter
  # wrong on CPU. Full precision: bfloat16 inputs would break the bound.
  gradients = _at_least_float32(gradients)
  return jnp.tensordot(
    scales.astype(gradients.dtype),
    gradients,
    axes=1,
    precision=jax.lax.Precision.HIGHEST,
  )


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
