"""One function, three ways: clipped sums of per-example gradients.

- "vmap": every per-example gradient is formed (`per_example`); any
  differentiable function, most memory.
- "one_pass": one forward, one backward pass; layers' inputs and output
  gradients give norms and sum (`book_keeping`, arXiv 2210.00038).
- "two_pass": one backward pass for the norms, which keeps nothing, and a second
  one of the re-weighted loss (ghost norms, arXiv 2110.05679); least memory.
- "auto": chosen for model and shape, see `choose`.

Shapes: B batch; P* the shape of a parameter.
"""

import collections
from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dptrain.clipping import book_keeping
from dptrain.clipping import checking
from dptrain.clipping import parameter_trees
from dptrain.clipping import per_example
from dptrain.clipping import rules
from dptrain.clipping import survey
from dptrain.clipping import taps
from dptrain.clipping import two_pass

METHODS = ("auto", "vmap", "one_pass", "two_pass")


class Choice(NamedTuple):
  """How clipped sums of a loss function are computed.

  Attributes:
    method: "vmap", "one_pass" or "two_pass".
    uses: the tapped layers; empty for "vmap".
    reason: why, in words.
  """

  method: str
  uses: tuple[taps.Use, ...]
  reason: str


def choose(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: Any,
  method: str = "auto",
) -> Choice:
  """Decides how to clip, by tracing; nothing is computed.

  "auto" takes one_pass wherever the activations that it keeps are fewer numbers
  than the gradients that vmap would form. Elsewhere it leaves those weights to
  per-example copies whose own activations outnumber them (the first
  convolutions of a network, tiny weights under long sequences), and takes vmap
  if that leaves none.

  Args:
    loss_fn: per-example losses.
    params: parameters, or their shapes.
    batch: arrays [B, ...], or their shapes.
    keys: typed PRNG keys [B], or their shape.
    method: one of `METHODS`.

  Returns:
    The choice.

  Raises:
    TypeError: one_pass or two_pass was asked for, but the parameters are not
      nested dictionaries of arrays.
    ValueError: unknown method, or a layer's rule does not fit it.
  """
  if method not in METHODS:
    raise ValueError(
      f"clipping method {method!r} is unknown; use one of {METHODS}."
    )
  if method == "vmap":
    return Choice("vmap", (), "as asked")
  try:
    uses = survey.survey(loss_fn, params, _one(batch), _one(keys))
  except Exception as error:
    # A loss may refuse the extra entries beside its parameters in any way.
    if method != "auto":
      raise
    return Choice("vmap", (), f"{type(error).__name__}: {error}")
  if method != "auto":
    return Choice(method, uses, f"as asked; {_told(uses, params)}")
  if not uses:
    return Choice("vmap", (), "no layer of the model can be tapped")
  kept, formed = _sizes(uses, params)
  if kept.total() > formed.total():
    small = {weight for weight in kept if kept[weight] <= formed[weight]}
    fewer = taps.sharing_within(
      tuple(use for use in uses if use.weight in small)
    )
    if not fewer:
      told = f"{_told(uses, params)}, more than their gradients take"
      return Choice("vmap", (), told)
    uses = fewer
  return Choice("one_pass", uses, _told(uses, params))


def _sizes(
  uses: tuple[taps.Use, ...], params: Any
) -> tuple[collections.Counter[taps.Path], collections.Counter[taps.Path]]:
  """By weight: numbers that taps keep, and that its gradient has."""
  flat = parameter_trees.leaves_by_path(params)
  kept = book_keeping.kept_elements(uses)
  return kept, collections.Counter(
    {weight: math.prod(flat[weight].shape) for weight in kept}
  )


def _told(uses: tuple[taps.Use, ...], params: Any) -> str:
  kept, formed = _sizes(uses, params)
  size = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  return (
    f"{formed.total():,} of {size:,} parameters are tapped, keeping"
    f" {kept.total():,} activations per example"
  )


def clipped_sum(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  is_padding: jax.Array,
  rule: rules.ClippingRule,
  method: str | Choice = "auto",
) -> per_example.ClippedSum:
  """Sums the clipped gradients of the examples of one physical batch.

  Example, on a plain Flax model:

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> model = nn.Dense(1)
  >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.arange(4.0)}
  >>> params = model.init(jax.random.key(0), batch["x"])["params"]
  >>> def losses(params, batch, keys):
  ...   out = model.apply({"params": params}, batch["x"])[:, 0]
  ...   return (out - batch["y"]) ** 2, {}
  >>> keys = jax.random.split(jax.random.key(1), 4)
  >>> total = clipped_sum(
  ...   losses, params, batch, keys, jnp.zeros(4, bool), rules.ClippingRule()
  ... )
  >>> total.gradients["kernel"].shape
  (3, 1)

  Formal guarantee: one example moves `gradients` by at most `rule.sensitivity`
  in L2 norm, whatever the method. The norm by which an example is clipped is
  that of the very vector which enters the sum: both are made of the same
  factors, in at least float32. Padding rows contribute exactly zero, and so do
  examples whose loss or gradient is not finite.

  Args:
    loss_fn: per-example losses, see `per_example.PerExampleLoss`.
    params: tree of arrays P*.
    batch: tree of arrays [B, ...].
    keys: typed PRNG keys [B].
    is_padding: [B] bool.
    rule: the clipping rule.
    method: one of `METHODS`, or what `choose` returned.

  Returns:
    The clipped sum and what was seen on the way.

  Raises:
    ValueError: the method is unknown or cannot serve the rule.
  """
  if isinstance(method, str):
    method = choose(loss_fn, params, batch, keys, method)
  if method.method == "vmap":
    return per_example.clipped_sum(
      loss_fn, params, batch, keys, is_padding, rule
    )
  if method.method == "two_pass":
    return two_pass.clipped_sum(
      loss_fn, params, batch, keys, is_padding, rule, method.uses
    )
  kept = book_keeping.backward(loss_fn, params, batch, keys, method.uses)
  squares = book_keeping.squared_norms(method.uses, kept)
  clip = per_example.clip_factors(squares, kept.losses, is_padding, rule)
  shapes = {
    p: x.shape for p, x in parameter_trees.leaves_by_path(params).items()
  }

  def weighted(kept: book_keeping.Kept) -> dict[taps.Path, jax.Array]:
    return book_keeping.weighted_sum(method.uses, kept, clip.scales, shapes)

  def weighted_finite(kept: book_keeping.Kept) -> Mapping[Any, jax.Array]:
    # 0 * inf is nan: what must not count has to be taken out, not scaled away.
    own, seen = jax.tree.map(
      lambda x: per_example.without(x, ~clip.finite), (kept.own, kept.seen)
    )
    return weighted(kept._replace(own=own, seen=seen))

  total = jax.lax.cond(jnp.all(clip.finite), weighted, weighted_finite, kept)
  return per_example.ClippedSum(
    parameter_trees.like(params, total),
    kept.losses,
    clip.norms,
    clip.contributes,
    kept.aux,
  )


def check_against_vmap(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  *,
  method: str = "one_pass",
  rtol: float = 1e-5,
) -> None:
  """Holds a method's norms and sums against those of vmap.

  Run it once for every rule given to `taps.register`, on a small model and a
  batch whose rows differ. Example:

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> model = nn.Dense(3)
  >>> x = jax.random.normal(jax.random.key(0), (4, 5, 2))
  >>> params = model.init(jax.random.key(1), x)["params"]
  >>> def losses(params, batch, keys):
  ...   return jnp.sum(model.apply({"params": params}, batch) ** 2, (1, 2)), {}
  >>> keys = jax.random.split(jax.random.key(2), 4)
  >>> check_against_vmap(losses, params, x, keys, method="two_pass")

  Compared are, for each parameter, its per-example norms and its part of a sum
  in which every example is clipped. An error counts relative to the parameter's
  own norm and a tenth of the whole gradient's, which rounding follows.

  Args:
    loss_fn: per-example losses.
    params: nested dict of arrays P*.
    batch: tree of arrays [B, ...], all finite.
    keys: typed PRNG keys [B].
    method: "one_pass" or "two_pass".
    rtol: the largest error; in bfloat16, about 0.02.

  Raises:
    ValueError: they differ; the message names the worst parameter.
  """
  uses = choose(loss_fn, params, batch, keys, method).uses
  errors = checking.errors(loss_fn, params, batch, keys, method, uses)
  worst = max(errors, key=lambda path: errors[path][0], default=None)
  # Written so that nan fails.
  if worst is not None and not errors[worst][0] <= rtol:
    error, what = errors[worst]
    raise ValueError(
      f"{method} gets the {what} of parameter {'/'.join(worst)!r} wrong by"
      f" {error:.2g} of its size, more than rtol={rtol:g}; correct the rule of"
      " its layer, or use method 'vmap'."
    )


def _one(tree: Any) -> Any:
  """The shapes of a batch of one example."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree
  )
