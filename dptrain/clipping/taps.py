"""Taps: what goes into a layer and what gradient comes back to its output.

A weight W that only ever meets activations as `A @ W` has the per-example
gradient `A^T G`, with A the layer's input and G the gradient at its output. So
A and G, of the size of activations, stand for a gradient of the size of W.
Flax's `intercept_methods` sees every layer of an unchanged model; a tap there
is the identity on the layer's output, and its backward pass hands out A and G
as the "gradients" of two zero arrays. Those zeros travel as extra entries of
the parameter tree, so they pass through `nn.scan` and `nn.remat` as the weights
do.

Which weights can be tapped is not assumed but read off the traced program
(`survey`): one that is used in any other way, or in a way that sums over the
steps of a loop, is left to others.

Shapes: B batch, S stacked layers of a scan, T rows of one example that meet the
weight, d and p the weight's input and output width, V vocabulary.
"""

import collections
from collections.abc import Callable, Container, Iterator, Mapping
import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from dptrain.clipping import products

_PROBE = "dptrain_probe"
_ANCHOR = "dptrain_anchor"
_SQUARES = "dptrain_squares"
Path = tuple[str, ...]


class Use(NamedTuple):
  """One call of a tapped layer.

  Attributes:
    weight: path of the weight in the parameter tree.
    number: counts the calls that one layer receives.
    kind: "product" (A @ W), "lookup" (rows of W) or "attend" (A @ W^T).
    inputs: shape of what meets W, within one step of any scan: [..., d], or
      [...] of ids for a lookup.
    inputs_dtype: their dtype; ids travel as float32.
    outputs: shape of the output, features flattened into one axis: [..., p].
    outputs_dtype: its dtype.
    stack: lengths of the scans around the layer.
    same_inputs: weight and number of an earlier use with the very same input;
      None if it is the first.
  """

  weight: Path
  number: int
  kind: str
  inputs: tuple[int, ...]
  inputs_dtype: Any
  outputs: tuple[int, ...]
  outputs_dtype: Any
  stack: tuple[int, ...]
  same_inputs: tuple[Path, int] | None

  @property
  def name(self) -> tuple[Path, int]:
    """Identifies the use."""
    return self.weight, self.number


class Captured(NamedTuple):
  """What a use's tap handed out, for B examples.

  Attributes:
    inputs: [B, S, T, d], or [B, S, T] int32 ids of a lookup.
    gradients: [B, S, T, p].
  """

  inputs: jax.Array
  gradients: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerRule:
  """How one method of one Flax layer meets its weight.

  Attributes:
    weight: name of the parameter.
    kind: see `Use`.
    flatten: (module, input) -> input as [..., d], or None to leave the call
      alone.
    num_features: module -> how many trailing axes of the output are features.
  """

  weight: str
  kind: str
  flatten: Callable[[Any, jax.Array], jax.Array | None]
  num_features: Callable[[Any], int]


def _dense_inputs(module: Any, x: jax.Array) -> jax.Array | None:
  return None if _own_product(module) else x


def _dense_general_inputs(module: Any, x: jax.Array) -> jax.Array | None:
  if _own_product(module) or tuple(_axes(module.batch_dims)):
    return None
  axes = [axis % x.ndim for axis in _axes(module.axis)]
  if axes != sorted(axes):
    return None
  rest = [axis for axis in range(x.ndim) if axis not in axes]
  moved = jnp.transpose(x, (*rest, *axes))
  return moved.reshape(*moved.shape[: len(rest)], -1)


def _own_product(module: Any) -> bool:
  return bool(
    getattr(module, "dot_general", None)
    or getattr(module, "dot_general_cls", None)
  )


def _axes(value: Any) -> tuple[int, ...]:
  return tuple(value) if isinstance(value, (tuple, list)) else (value,)


RULES: dict[tuple[type, str], LayerRule] = {
  (nn.Dense, "__call__"): LayerRule(
    "kernel", "product", _dense_inputs, lambda module: 1
  ),
  (nn.DenseGeneral, "__call__"): LayerRule(
    "kernel",
    "product",
    _dense_general_inputs,
    lambda module: len(_axes(module.features)),
  ),
  (nn.Embed, "__call__"): LayerRule(
    "embedding", "lookup", lambda module, ids: ids, lambda module: 1
  ),
  (nn.Embed, "attend"): LayerRule(
    "embedding", "attend", lambda module, x: x, lambda module: 1
  ),
}


@jax.custom_vjp
def _tap(
  x: jax.Array, y: jax.Array, x_out: jax.Array, y_out: jax.Array
) -> jax.Array:
  del x, x_out, y_out
  return y


def _tap_forward(
  x: jax.Array, y: jax.Array, x_out: jax.Array, y_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
  del x_out, y_out
  return y, x


def _tap_backward(x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
  return jnp.zeros_like(x), g, x, g


_tap.defvjp(_tap_forward, _tap_backward)


@jax.custom_vjp
def _tap_output(y: jax.Array, y_out: jax.Array) -> jax.Array:
  del y_out
  return y


_tap_output.defvjp(lambda y, y_out: (y, None), lambda _, g: (g, g))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap_squares(
  kind: str, x: jax.Array, y: jax.Array, out: jax.Array
) -> jax.Array:
  del kind, x, out
  return y


def _tap_squares_forward(
  kind: str, x: jax.Array, y: jax.Array, out: jax.Array
) -> tuple[jax.Array, jax.Array]:
  del kind, out
  return y, x


def _tap_squares_backward(
  kind: str, x: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  rows = g.reshape(1, 1, -1, g.shape[-1])
  if kind == "lookup":
    ids = x.reshape(1, 1, -1).astype(jnp.int32)
    squares = products.lookup_squares(ids, rows)
  else:
    inputs = x.reshape(1, 1, -1, x.shape[-1])
    squares = products.squares(inputs, rows)
  return jnp.zeros_like(x), g, squares[0]


_tap_squares.defvjp(_tap_squares_forward, _tap_squares_backward)


@jax.custom_vjp
def _met(weight: jax.Array) -> jax.Array:
  """Marks in a traced program that a weight has met its layer."""
  return jnp.zeros((), jnp.float32) * weight.size


_met.defvjp(lambda w: (_met(w), None), lambda _, g: (g,))


class _Calls:
  """Numbers the calls that each layer receives within one trace of it."""

  def __init__(self) -> None:
    self._held: dict[int, tuple[Any, int]] = {}

  def next(self, module: Any) -> int:
    # The module is held, so that its id is not given to another.
    _, count = self._held.get(id(module), (module, 0))
    self._held[id(module)] = (module, count + 1)
    return count


def _matching(context: Any, args: Any, kwargs: Any) -> LayerRule | None:
  rule = RULES.get((type(context.module), context.method_name))
  if rule is None or len(args) != 1 or kwargs:
    return None
  return rule


def _flat_output(y: jax.Array, num_features: int) -> tuple[int, ...]:
  lead = y.shape[: y.ndim - num_features]
  return (*lead, math.prod(y.shape[y.ndim - num_features :]))


def survey(
  loss_fn: Callable[..., Any], params: Any, example: Any, key: Any
) -> tuple[Use, ...]:
  """Finds the weights that taps can stand for, by tracing.

  Args:
    loss_fn: (params, batch, keys) -> anything, made of Flax layers or not.
    params: nested dict of arrays or shapes.
    example: a batch of one example, or its shapes.
    key: a batch of one key, or its shape.

  Returns:
    All uses of all weights that are used by tapped layers only.
  """
  uses = _candidates(loss_fn, params, example, key)
  return _without_loops(loss_fn, params, example, key, uses)


def _candidates(
  loss_fn: Callable[..., Any], params: Any, example: Any, key: Any
) -> tuple[Use, ...]:
  """Uses of weights that meet tapped layers, unchanged, and nothing else."""
  leaves = leaves_by_path(params)
  weights = {rule.weight for rule in RULES.values()}
  folders = collections.Counter(p[:-1] for p in leaves if p[-1] in weights)
  numbered = [p for p in leaves if p[-1] in weights and folders[p[:-1]] == 1]
  found: dict[tuple[Path, int], Use] = {}
  spoilt: set[Path] = set()
  calls = _Calls()
  inputs_seen: dict[Any, tuple[Any, tuple[Path, int]]] = {}

  def look(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    rule = _matching(context, args, kwargs)
    module = context.module
    if rule is None or not module.has_variable("params", _PROBE):
      return next_fun(*args, **kwargs)
    probe: Any = module.get_variable("params", _PROBE)
    path = numbered[probe.shape[-1] - 1]
    y = next_fun(*args, **kwargs)
    x = rule.flatten(module, args[0])
    outer, inner = leaves[path].shape, probe.shape[:-1]
    depth = len(outer) - len(inner)
    if x is None or depth < 0 or outer[depth:] != inner:
      spoilt.add(path)
      return y
    name = (path, calls.next(module))
    ids = rule.kind == "lookup"
    # The input is held, so that its id is not given to another.
    view = id(args[0]), str(getattr(module, "axis", -1))
    first = inputs_seen.setdefault(view, (args[0], name))[1]
    use = Use(
      *name,
      kind=rule.kind,
      inputs=x.shape,
      inputs_dtype=jnp.dtype(jnp.float32) if ids else x.dtype,
      outputs=_flat_output(y, rule.num_features(module)),
      outputs_dtype=y.dtype,
      stack=outer[:depth],
      same_inputs=None if first == name or ids else first,
    )
    if found.setdefault(name, use) != use:
      spoilt.add(path)
    # A stand-in for the output: it depends on the input, and on the weight
    # through the mark only, so that any other use of the weight shows.
    mark = _met(module.get_variable("params", rule.weight))
    stand_in = jnp.sum(args[0]).astype(jnp.float32) + mark
    return jnp.broadcast_to(stand_in, y.shape).astype(y.dtype)

  probes = {
    (*path[:-1], _PROBE): jax.ShapeDtypeStruct(
      (*leaves[path].shape, number), "float32"
    )
    for number, path in enumerate(numbered, 1)
  }

  def run(leaves: Any, probes: Any, example: Any, key: Any) -> Any:
    with nn.intercept_methods(look):
      return loss_fn(nested({**leaves, **probes}), example, key)

  jaxpr = jax.make_jaxpr(run)(leaves, probes, example, key).jaxpr
  everything = [True] * len(jaxpr.outvars)
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, everything, instantiate=True)
  marks = {
    path: _marks(jaxpr, var)
    for path, var in zip(_order(leaves), jaxpr.invars, strict=False)
  }
  # As many marks as calls: none whose output is thrown away, none numbered like
  # another.
  calls_of = collections.Counter(use.weight for use in found.values())
  return tuple(
    use
    for use in found.values()
    if use.weight not in spoilt and marks[use.weight] == calls_of[use.weight]
  )


def _without_loops(
  loss_fn: Callable[..., Any],
  params: Any,
  example: Any,
  key: Any,
  uses: tuple[Use, ...],
) -> tuple[Use, ...]:
  """Drops weights whose taps would be summed over the steps of a loop."""
  flat = leaves_by_path(params)
  taps = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, (shape, dtype) in tap_shapes(uses).items()
  }

  def run(taps: Any, flat: Any, example: Any, key: Any) -> Any:
    with tapped():
      return loss_fn(nested({**flat, **taps}), example, key)

  traced = jax.make_jaxpr(run)(taps, flat, example, key)
  spoilt: set[Path] = set()
  for name, var in zip(_order(taps), traced.jaxpr.invars, strict=False):
    if name[-1] == _ANCHOR:
      continue
    if _marks(traced.jaxpr, var) is None:
      spoilt.add(name[:-1])
  spoilt_weights = {u.weight for u in uses if u.weight[:-1] in spoilt}
  # Who shares an input with a weight that is left out needs a tap of his own.
  kept = [use for use in uses if use.weight not in spoilt_weights]
  names_kept = {use.name for use in kept}
  return tuple(
    use if use.same_inputs in names_kept else use._replace(same_inputs=None)
    for use in kept
  )


def _marks(jaxpr: Any, var: Any) -> int | None:
  """How many taps or marks a value reaches; None if it meets anything else.

  In a scan, the value must be cut along the steps: what all steps share would
  get the sum of their gradients.
  """
  if any(v is var for v in jaxpr.outvars):
    return None
  total = 0
  for eqn in jaxpr.eqns:
    places = [i for i, v in enumerate(eqn.invars) if v is var]
    if not places:
      continue
    primitive = eqn.primitive.name
    if primitive.startswith("custom_vjp_call"):
      if not _is_own_tap(eqn, places):
        return None
      total += 1
      continue
    if primitive in ("while", "cond"):
      return None
    if primitive == "scan" and eqn.params["length"] != 1:
      first = eqn.params["num_consts"] + eqn.params["num_carry"]
      if min(places) < first:
        return None
    inner = [p for p in eqn.params.values() if hasattr(p, "eqns")]
    inner += [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
    if not inner or len(inner[0].invars) != len(eqn.invars):
      return None
    for place in places:
      found = _marks(inner[0], inner[0].invars[place])
      if found is None:
        return None
      total += found
  return total


def _is_own_tap(eqn: Any, places: list[int]) -> bool:
  """Whether a custom_vjp call is a mark, or a tap whose zeros fit.

  Under a vmap inside the model, a zero without the mapped axis would get the
  sum over it: then its shape is not that of what it stands for.
  """
  shapes = [v.aval.shape for v in eqn.invars]
  if len(shapes) == 1:
    return True
  if len(shapes) not in (2, 4):
    return False
  half = len(shapes) // 2
  return all(
    place >= half and shapes[place] == shapes[place - half] for place in places
  )


def _order(flat: Mapping[Path, Any]) -> list[Path]:
  """The keys in the order in which jax flattens the values."""
  return [
    path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(dict(flat))
  ]


def tap_shapes(
  uses: tuple[Use, ...], only_squares: Container[Path] = ()
) -> dict[Path, tuple[tuple[int, ...], Any]]:
  """The zero arrays that taps need, by their path in the parameter tree.

  Args:
    uses: what `survey` found.
    only_squares: weights, each of one use, whose taps hand out nothing but the
      squared norm.
  """
  shapes: dict[Path, tuple[tuple[int, ...], Any]] = {}
  for use in uses:
    inputs, outputs = _tap_names(use)
    if use.weight in only_squares:
      shapes[*use.weight[:-1], _SQUARES] = (use.stack, jnp.dtype(jnp.float32))
      shapes[*use.weight[:-1], _ANCHOR] = (use.stack, jnp.dtype(jnp.float32))
      continue
    if use.same_inputs is None:
      shapes[inputs] = ((*use.stack, *use.inputs), use.inputs_dtype)
    shapes[*use.weight[:-1], _ANCHOR] = (use.stack, jnp.dtype(jnp.float32))
    shapes[outputs] = ((*use.stack, *use.outputs), use.outputs_dtype)
  return shapes


def _tap_names(use: Use) -> tuple[Path, Path]:
  folder = use.weight[:-1]
  return (
    (*folder, f"dptrain_inputs_{use.number}"),
    (*folder, f"dptrain_outputs_{use.number}"),
  )


@contextlib.contextmanager
def tapped() -> Iterator[None]:
  """Within it, layers beside which `tap_shapes` arrays stand carry taps."""
  calls = _Calls()

  def attach(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    rule = _matching(context, args, kwargs)
    module = context.module
    if rule is None:
      return next_fun(*args, **kwargs)
    number = calls.next(module)
    y_name = f"dptrain_outputs_{number}"
    whole = module.has_variable("params", y_name)
    if not whole and not module.has_variable("params", _SQUARES):
      return next_fun(*args, **kwargs)
    y: Any = next_fun(*args, **kwargs)
    # An output that is the same for all examples (of positions, say) would get
    # the sum of their gradients: a zero per example tells them apart.
    anchor = module.get_variable("params", _ANCHOR)
    y = y + jnp.asarray(anchor, y.dtype)
    flat = y.reshape(_flat_output(y, rule.num_features(module)))
    x = rule.flatten(module, args[0])
    if x is None:
      raise AssertionError("the survey leaves such layers alone")
    x = jax.lax.stop_gradient(x)
    if rule.kind == "lookup":
      x = x.astype(jnp.float32)  # ids have no gradient to travel as
    x_name = f"dptrain_inputs_{number}"
    if not whole:
      out = module.get_variable("params", _SQUARES)
      flat = _tap_squares(rule.kind, x, flat, out)
    elif module.has_variable("params", x_name):
      x_out = module.get_variable("params", x_name)
      flat = _tap(x, flat, x_out, module.get_variable("params", y_name))
    else:
      flat = _tap_output(flat, module.get_variable("params", y_name))
    return flat.reshape(y.shape)

  with nn.intercept_methods(attach):
    yield


def squares_path(weight: Path) -> Path:
  """Where a tap that hands out squared norms only keeps its zero."""
  return (*weight[:-1], _SQUARES)


def captured(
  uses: tuple[Use, ...], handed_out: Mapping[Path, jax.Array]
) -> dict[tuple[Path, int], Captured]:
  """Sorts what the taps handed out, for B examples, by use.

  Args:
    uses: what `survey` found.
    handed_out: "gradients" [B, ...] of the zero arrays of `tap_shapes`.

  Returns:
    Inputs and gradients by the name of the use.
  """
  inputs: dict[tuple[Path, int], jax.Array] = {}
  result = {}
  for use in uses:
    x_name, y_name = _tap_names(use)
    layers = math.prod(use.stack)
    if use.same_inputs is None:
      x = handed_out[x_name]
      if use.kind == "lookup":
        x = x.reshape(x.shape[0], layers, -1).astype(jnp.int32)
      else:
        x = x.reshape(x.shape[0], layers, -1, x.shape[-1])
      inputs[use.name] = x
    else:
      inputs[use.name] = inputs[use.same_inputs]
    g = handed_out[y_name]
    result[use.name] = Captured(
      inputs[use.name], g.reshape(g.shape[0], layers, -1, g.shape[-1])
    )
  return result


def leaves_by_path(tree: Any) -> dict[Path, Any]:
  """The leaves of nested mappings, by their path.

  Raises:
    TypeError: the tree has lists, tuples or other containers in it.
  """
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
      raise TypeError(
        "taps need the parameters as nested dictionaries, but"
        f" {jax.tree_util.keystr(path)} is inside another container"
      )
    found[tuple(key.key for key in path)] = leaf
  return found


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
  """Nested dictionaries out of leaves by path."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree
