"""Which weights taps can stand for: not assumed but read off traced programs.

A weight that is used in any way that its layers' taps do not see, or in one
that sums over the steps of a loop, is left to others; so is one about which
there is doubt. A norm that misses a part of the gradient would void the privacy
guarantee, a weight that is left out costs memory only.

Three questions, each answered by tracing:

1. Does the weight meet its layers, unchanged, and nothing else? (`_candidates`)
2. Does each tap's zero meet its tap, once? (`_in_place`)
3. Is each input that several layers share handed out? (`_heard`)
"""

import collections
from collections.abc import Callable
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from dptrain.clipping import backward_rules
from dptrain.clipping import layer_rules
from dptrain.clipping import marks
from dptrain.clipping import parameter_trees
from dptrain.clipping import taps

_PROBE = "dptrain_probe"

# A model under `jax.jit` is traced once per shape: probes of ever new shapes
# keep one survey from being answered with another's trace.
_surveys = itertools.count(1)


def survey(
  loss_fn: Callable[..., Any], params: Any, example: Any, key: Any
) -> tuple[taps.Use, ...]:
  """Finds the weights that taps can stand for, by tracing.

  Args:
    loss_fn: (params, batch, keys) -> (losses, aux), made of Flax layers or not.
    params: nested dict of arrays or shapes.
    example: a batch of one example, or its shapes.
    key: a batch of one key, or its shape.

  Returns:
    All uses of all weights that are used by tapped layers only.

  Raises:
    TypeError: the parameters are not nested dictionaries of arrays.
    ValueError: the rule of a layer does not fit its shapes.
  """
  uses = _candidates(loss_fn, params, example, key)
  while uses:
    kept = _in_place(loss_fn, params, example, key, uses)
    if kept == uses:
      kept = _heard(loss_fn, params, example, key, uses)
    if kept == uses:
      break
    uses = kept
  return uses


def _candidates(
  loss_fn: Callable[..., Any], params: Any, example: Any, key: Any
) -> tuple[taps.Use, ...]:
  """Uses of weights that meet tapped layers, unchanged, and nothing else."""
  leaves = parameter_trees.leaves_by_path(params)
  weights = {rule.weight for rule in layer_rules.RULES.values()}
  folders = collections.Counter(p[:-1] for p in leaves if p[-1] in weights)
  numbered = [p for p in leaves if p[-1] in weights and folders[p[:-1]] == 1]
  base = next(_surveys) * (len(numbered) + 1)
  look = _Look(leaves, numbered, base)
  probes = {
    (*path[:-1], _PROBE): jax.ShapeDtypeStruct(
      (*leaves[path].shape, base + number), "float32"
    )
    for number, path in enumerate(numbered)
  }

  def run(leaves: Any, probes: Any, example: Any, key: Any) -> Any:
    tree = parameter_trees.with_leaves(params, {**leaves, **probes})
    with nn.intercept_methods(look):
      return loss_fn(tree, example, key)

  jaxpr = jax.make_jaxpr(run)(leaves, probes, example, key).jaxpr
  everything = [True] * len(jaxpr.outvars)
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, everything, instantiate=True)
  of_path = dict(zip(parameter_trees.order(leaves), jaxpr.invars, strict=False))
  met = {
    path: marks.layers_met(jaxpr, of_path[path], number)
    for number, path in enumerate(numbered)
  }
  # As many as calls: none whose output is thrown away, none numbered like
  # another.
  calls_of = collections.Counter(use.weight for use in look.found.values())
  # Uses of one weight add up as factors, so they must agree on its two sides.
  orders = collections.defaultdict(set)
  for use in look.found.values():
    orders[use.weight].add(use.weight_order)
  return taps.sharing_within(
    tuple(
      use
      for use in look.found.values()
      if use.weight not in look.spoilt
      and len(orders[use.weight]) == 1
      and met[use.weight] == calls_of[use.weight]
    )
  )


class _Look:
  """An interceptor that notes layers' calls and puts stand-ins in their place.

  Attributes:
    found: the uses, by name.
    spoilt: weights with a call that no tap can stand for.
  """

  def __init__(
    self,
    leaves: dict[taps.Path, Any],
    numbered: list[taps.Path],
    base: int,
  ) -> None:
    self.found: dict[tuple[taps.Path, int], taps.Use] = {}
    self.spoilt: set[taps.Path] = set()
    self._leaves, self._numbered, self._base = leaves, numbered, base
    self._calls = taps.Calls()
    self._inputs: dict[Any, tuple[Any, tuple[taps.Path, int]]] = {}

  def __call__(
    self, next_fun: Any, args: Any, kwargs: Any, context: Any
  ) -> Any:
    rule = layer_rules.matching(context, args, kwargs)
    module = context.module
    if (
      rule is None
      or self._calls.within(module)
      or not module.has_variable("params", _PROBE)
      or not module.has_variable("params", rule.weight)
    ):
      return next_fun(*args, **kwargs)
    probe: Any = module.get_variable("params", _PROBE)
    number = probe.shape[-1] - self._base
    path = self._numbered[number]
    name = (path, self._calls.next(module))
    y = self._calls.around(module, next_fun, *args)
    weight = module.get_variable("params", rule.weight)
    use = self._use(name, rule, module, args[0], weight, y)
    # An interceptor inside could change what goes in or what comes out.
    if use is None or next_fun is not context.orig_method:
      self.spoilt.add(path)
      return y
    if self.found.setdefault(name, use) != use:
      self.spoilt.add(path)
    return marks.layer(args[0], weight, y, number)

  def _use(
    self,
    name: tuple[taps.Path, int],
    rule: layer_rules.LayerRule,
    module: Any,
    given: Any,
    weight: Any,
    y: Any,
  ) -> taps.Use | None:
    """The call of a layer; None if no tap can stand for it."""
    x = rule.flatten(module, jnp.asarray(given))
    outer, inner = self._leaves[name[0]].shape, weight.shape
    depth = len(outer) - len(inner)
    if x is None or depth < 0 or outer[depth:] != inner:
      return None
    if not jnp.issubdtype(y.dtype, jnp.floating):
      return None
    outputs = rule.output_rows(module, y).shape
    _check_fit(rule, module, x, outputs, inner)
    ids = rule.kind == "lookup"
    first = name
    view = None if ids else rule.view(module)
    if view is not None:
      # The input is held, so that its id is not given to another.
      same = id(given), view, outer[:depth], x.shape, x.dtype
      first = self._inputs.setdefault(same, (given, name))[1]
    return taps.Use(
      *name,
      kind=rule.kind,
      inputs=x.shape,
      inputs_dtype=jnp.dtype(jnp.float32) if ids else x.dtype,
      outputs=outputs,
      outputs_dtype=y.dtype,
      stack=outer[:depth],
      same_inputs=None if first == name else first,
      weight_order=rule.weight_order(module),
    )


def _check_fit(
  rule: layer_rules.LayerRule,
  module: Any,
  x: jax.Array,
  outputs: tuple[int, ...],
  inner: tuple[int, ...],
) -> None:
  """Refuses rules whose factors cannot be those of the weight.

  Raises:
    ValueError: the shapes do not fit.
  """
  size, width = math.prod(inner), outputs[-1]
  if rule.kind == "lookup":
    fits = x.shape == outputs[:-1] and width == inner[-1]
  else:
    fits = x.shape[:-1] == outputs[:-1] and x.shape[-1] * width == size
    fits &= rule.kind == "product" or inner[-1] == x.shape[-1]
  if not fits:
    raise ValueError(
      f"the rule of {type(module).__name__} ({rule.kind}) makes inputs"
      f" {x.shape} and outputs {outputs}, which cannot belong to"
      f" {rule.weight} {inner}; correct its flatten or num_features."
    )


def _in_place(
  loss_fn: Callable[..., Any],
  params: Any,
  example: Any,
  key: Any,
  uses: tuple[taps.Use, ...],
) -> tuple[taps.Use, ...]:
  """Drops weights whose taps' zeros do not meet one tap each, unsummed."""
  flat = parameter_trees.leaves_by_path(params)
  zeros = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, (shape, dtype) in taps.tap_shapes(uses).items()
  }

  def run(zeros: Any, flat: Any, example: Any, key: Any) -> Any:
    with taps.tapped():
      tree = parameter_trees.with_leaves(params, {**flat, **zeros})
      return loss_fn(tree, example, key)

  jaxpr = jax.make_jaxpr(run)(zeros, flat, example, key).jaxpr
  met = {
    name: marks.meetings(jaxpr, var, backward_rules.is_tap)
    for name, var in zip(
      parameter_trees.order(zeros), jaxpr.invars, strict=False
    )
    if taps.is_tap(name)
  }
  spoilt = {
    use.weight
    for use in uses
    if any(met[name] != 1 for name in taps.tap_names(use))
  }
  return taps.sharing_within(
    tuple(use for use in uses if use.weight not in spoilt)
  )


def _heard(
  loss_fn: Callable[..., Any],
  params: Any,
  example: Any,
  key: Any,
  uses: tuple[taps.Use, ...],
) -> tuple[taps.Use, ...]:
  """Gives own taps to layers that share the input of one without gradient.

  Nothing flows back into a layer whose output is cut off (`stop_gradient`), so
  its tap hands out no inputs, and others must not rely on it.
  """
  if all(use.same_inputs is None for use in uses):
    return uses
  flat = parameter_trees.leaves_by_path(params)
  weights = list(dict.fromkeys(use.weight for use in uses))
  base = next(_surveys) * (len(weights) + 1)
  stacks = {use.weight: use.stack for use in uses}
  trials = {
    taps.trial_path(weight): jax.ShapeDtypeStruct(
      (*stacks[weight], base + number), "float32"
    )
    for number, weight in enumerate(weights)
  }
  zeros = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, (shape, dtype) in taps.tap_shapes(uses).items()
  }
  heard: set[tuple[taps.Path, int]] = set()

  def note(size: int, number: int) -> None:
    heard.add((weights[size - base], number))

  def run(zeros: Any, others: Any, example: Any, key: Any) -> jax.Array:
    with taps.tapped(note):
      tree = parameter_trees.with_leaves(params, {**others, **zeros})
      return jnp.sum(loss_fn(tree, example, key)[0])

  jax.eval_shape(jax.grad(run), zeros, {**flat, **trials}, example, key)
  return tuple(
    use if use.same_inputs in heard else use._replace(same_inputs=None)
    for use in uses
  )
