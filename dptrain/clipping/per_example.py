"""Clipped sums of per-example gradients, by vmap: the reference method.

Shapes: B batch; P* the shape of a parameter.
"""

from collections.abc import Callable, Mapping
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
    norms: [B] norms of whole gradients before clipping: private.
    contributes: [B] bool: neither a padding row nor non-finite.
    aux: what the loss function returned beside the losses: private.
  """

  gradients: Any
  losses: jax.Array
  norms: jax.Array
  contributes: jax.Array
  aux: Any


class ClipFactors(NamedTuple):
  """What each example's gradient is multiplied by.

  Attributes:
    scales: [B] factors for each parameter, by its path; 0 where an example
      must not contribute.
    norms: [B] norms of whole gradients.
    finite: [B] bool: loss and gradient are finite.
    contributes: [B] bool: finite and not a padding row.
  """

  scales: dict[Any, jax.Array]
  norms: jax.Array
  finite: jax.Array
  contributes: jax.Array


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
  leaves, treedef = jax.tree.flatten(gradients)
  paths = _paths(gradients)
  by_path = {path: squares(g) for path, g in zip(paths, leaves, strict=True)}
  clip = clip_factors(by_path, losses, is_padding, rule)

  def weighted(leaves: list[jax.Array]) -> list[jax.Array]:
    return [
      contraction(clip.scales[path], g)
      for path, g in zip(paths, leaves, strict=True)
    ]

  def weighted_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    # 0 * inf is nan: what must not count has to be taken out, not scaled away.
    return weighted([without(g, ~clip.finite) for g in leaves])

  total = jax.lax.cond(jnp.all(clip.finite), weighted, weighted_finite, leaves)
  return ClippedSum(
    jax.tree.unflatten(treedef, total),
    losses,
    clip.norms,
    clip.contributes,
    aux,
  )


def squares(gradients: jax.Array) -> jax.Array:
  """Squared norms [B] of one parameter's gradients [B, P*]."""
  return jnp.sum(jnp.square(_wide(gradients)), axis=range(1, gradients.ndim))


def clip_factors(
  by_path: Mapping[Any, jax.Array],
  losses: jax.Array,
  is_padding: jax.Array,
  rule: rules.ClippingRule,
) -> ClipFactors:
  """From squared norms to the factors that bound each contribution.

  Formal guarantee: scaled by these, an example's gradient has norm at most
  `rule.sensitivity`; one that is padding or not finite gets factors 0.

  Args:
    by_path: [B] squared norms of each parameter's gradient, by its path.
    losses: [B].
    is_padding: [B] bool.
    rule: the clipping rule.
  """
  norms = jnp.sqrt(_total(list(by_path.values())))
  finite = jnp.isfinite(norms) & jnp.isfinite(losses)
  contributes = finite & ~is_padding
  members: dict[str, list[Any]] = {}
  for path in by_path:
    group = rule.groups(path) if rule.groups else ""
    members.setdefault(group, []).append(path)
  scales: dict[Any, jax.Array] = {}
  for paths in members.values():
    norm = jnp.sqrt(_total([by_path[path] for path in paths]))
    factor = rule.scales(jnp.where(finite, norm, 0.0), len(members))
    factor = jnp.where(contributes, factor, 0.0)
    scales |= dict.fromkeys(paths, factor)
  return ClipFactors(scales, norms, finite, contributes)


def contraction(scales: jax.Array, gradients: jax.Array) -> jax.Array:
  """Sum over examples of scale times gradient: [B], [B, P*] -> P*.

  A contraction, not a product and a sum: jaxlib 0.10.2 computes the latter
  wrong on CPU. Full precision: bfloat16 inputs would break the bound.
  """
  gradients = _wide(gradients)
  return jnp.tensordot(
    scales.astype(gradients.dtype),
    gradients,
    axes=1,
    precision=jax.lax.Precision.HIGHEST,
  )


def without(x: jax.Array, rows: jax.Array) -> jax.Array:
  """`x` [B, ...] with zeros in the rows that `rows` [B] marks."""
  mask = rows.reshape(-1, *[1] * (x.ndim - 1))
  return jnp.where(mask, jnp.zeros_like(x), x)


def _paths(tree: Any) -> list[tuple[str, ...]]:
  """The path of each leaf, in the order of flattening."""
  return [
    tuple(str(getattr(key, "key", key)) for key in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _total(squares: list[jax.Array]) -> jax.Array:
  return sum(squares[1:], start=squares[0])


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
