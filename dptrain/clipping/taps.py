"""Taps: what goes into a layer and what gradient comes back to its output.

A weight W that only ever meets activations as `A @ W` has the per-example
gradient `A^T G`, with A the layer's input and G the gradient at its output. So
A and G, of the size of activations, stand for a gradient of the size of W.
Flax's `intercept_methods` sees every layer of an unchanged model; a tap there
is the identity on the layer's output, and its backward pass hands out A and G
as the "gradients" of two zero arrays. Those zeros travel as extra entries of
the parameter tree, so they pass through `nn.scan` and `nn.remat` as the weights
do.

Which weights can be tapped is read off the traced program: see `survey`.

Shapes: B batch, S stacked layers of a scan, T rows of one example that meet the
weight, d and p the weight's input and output width, V vocabulary, P* a weight.
"""

from collections.abc import Callable, Container, Iterator, Mapping
import contextlib
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dptrain.clipping import backward_rules
from dptrain.clipping import layer_rules
from dptrain.clipping import parameter_trees

Path = parameter_trees.Path

_ANCHOR = "dptrain_anchor"
_SQUARES = "dptrain_squares"
_SUM = "dptrain_sum"
_SCALE = "dptrain_scale"
_TRIAL = "dptrain_trial"


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
    weight_order: `LayerRule.weight_order`.
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
  weight_order: layer_rules.Order = None

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


def register(
  module_type: type[nn.Module],
  method_name: str,
  rule: layer_rules.LayerRule,
) -> None:
  """Lets taps stand for the weights of a layer of one's own.

  A layer without a rule is clipped exactly, too, but by forming its gradient
  for every example. Example, a layer that computes x @ W:

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> from dptrain.clipping import layer_rules, methods, taps
  >>> class Project(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     init = nn.initializers.lecun_normal()
  ...     return x @ self.param("weight", init, (x.shape[-1], 16))
  >>> rule = layer_rules.LayerRule("weight", "product", lambda module, x: x)
  >>> taps.register(Project, "__call__", rule)
  >>> model, x = Project(), jnp.ones((4, 3, 8))
  >>> params = model.init(jax.random.key(0), x)["params"]
  >>> def losses(params, batch, keys):
  ...   return jnp.sum(model.apply({"params": params}, batch) ** 2, (1, 2)), {}
  >>> keys = jax.random.split(jax.random.key(1), 4)
  >>> len(methods.choose(losses, params, x, keys, "one_pass").uses)
  1
  >>> methods.check_against_vmap(losses, params, x, keys)

  A wrong rule makes wrong norms, and these void the privacy guarantee: always
  hold a new rule against `methods.check_against_vmap`. Only calls with one
  positional argument are tapped, and only layers of exactly this type:
  subclasses are registered on their own.

  Args:
    module_type: the layer's class.
    method_name: its method that meets the weight, often "__call__".
    rule: how.

  Raises:
    ValueError: the type is no layer, lacks the method, or has another rule.
  """
  if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
    raise ValueError(
      f"module_type={module_type!r} is not a subclass of flax.linen.Module;"
      " register the class of the layer."
    )
  if not callable(getattr(module_type, method_name, None)):
    raise ValueError(
      f"method_name={method_name!r} is not a method of {module_type.__name__};"
      " name the one that meets the weight."
    )
  known = layer_rules.RULES.setdefault((module_type, method_name), rule)
  if known != rule:
    raise ValueError(
      f"{module_type.__name__}.{method_name} has a rule already; register a"
      " subclass to treat it differently."
    )


class Calls:
  """Numbers the calls that each layer receives within one trace of it."""

  def __init__(self) -> None:
    self._held: dict[int, tuple[Any, int]] = {}
    self._open: set[int] = set()

  def next(self, module: Any) -> int:
    """The number of this call."""
    # The module is held, so that its id is not given to another.
    _, count = self._held.get(id(module), (module, 0))
    self._held[id(module)] = (module, count + 1)
    return count

  def around(self, module: Any, fun: Callable[..., Any], *args: Any) -> Any:
    """Calls a method; what it calls on the same module is a part of it."""
    self._open.add(id(module))
    try:
      return fun(*args)
    finally:
      self._open.discard(id(module))

  def within(self, module: Any) -> bool:
    """Whether a call of this module is under way."""
    return id(module) in self._open


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
    shapes[_beside(use.weight, _ANCHOR)] = (use.stack, jnp.dtype(jnp.float32))
    if use.weight in only_squares:
      shapes[squares_path(use.weight)] = (use.stack, _sum_dtype(use))
      continue
    if use.same_inputs is None:
      shapes[inputs] = ((*use.stack, *use.inputs), use.inputs_dtype)
    shapes[outputs] = ((*use.stack, *use.outputs), use.outputs_dtype)
  return shapes


def tap_names(use: Use) -> list[Path]:
  """The paths of the zeros that one use needs for itself."""
  inputs, outputs = _tap_names(use)
  return [outputs] if use.same_inputs else [inputs, outputs]


def sum_zeros(
  uses: tuple[Use, ...],
  scales: Mapping[Path, jax.Array],
  shapes: Mapping[Path, tuple[int, ...]],
) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array]]:
  """What taps need that hand out weighted sums over the batch.

  Args:
    uses: what `survey` found.
    scales: [B] by weight.
    shapes: P* by weight.

  Returns:
    Arrays per example [B, ...], and zeros for all of them.
  """
  each: dict[Path, jax.Array] = {}
  common: dict[Path, jax.Array] = {}
  for use in uses:
    scale = scales[use.weight]
    size = len(scale)
    scale = scale.reshape(size, *[1] * len(use.stack))
    each[_beside(use.weight, _SCALE)] = jnp.broadcast_to(
      scale, (size, *use.stack)
    )
    anchors = jnp.zeros((size, *use.stack), jnp.float32)
    each[_beside(use.weight, _ANCHOR)] = anchors
    width = use.inputs[-1] if use.kind == "attend" else use.outputs[-1]
    rows = math.prod(shapes[use.weight][len(use.stack) :]) // width
    dtype = _sum_dtype(use)
    before = common.get(sum_path(use.weight))
    if before is not None:
      dtype = jnp.promote_types(dtype, before.dtype)
    common[sum_path(use.weight)] = jnp.zeros((*use.stack, rows, width), dtype)
  return each, common


def _sum_dtype(use: Use) -> Any:
  wide = jnp.promote_types(use.outputs_dtype, jnp.float32)
  return (
    wide if use.kind == "lookup" else jnp.promote_types(use.inputs_dtype, wide)
  )


def _beside(weight: Path, name: str) -> Path:
  return (*weight[:-1], name)


def _tap_names(use: Use) -> tuple[Path, Path]:
  return (
    _beside(use.weight, f"dptrain_inputs_{use.number}"),
    _beside(use.weight, f"dptrain_outputs_{use.number}"),
  )


def squares_path(weight: Path) -> Path:
  """Where a tap that hands out squared norms only keeps its zero."""
  return _beside(weight, _SQUARES)


def sum_path(weight: Path) -> Path:
  """Where taps that hand out weighted sums keep their zero."""
  return _beside(weight, _SUM)


def trial_path(weight: Path) -> Path:
  """Where a trial array stands, whose last dimension is told to `note`."""
  return _beside(weight, _TRIAL)


def is_tap(path: Path) -> bool:
  """Whether it is the path of a zero that stands for a factor."""
  return path[-1].startswith(("dptrain_inputs_", "dptrain_outputs_"))


def _silent() -> None:
  """Takes no notice of a backward pass."""


@contextlib.contextmanager
def tapped(note: Callable[[int, int], None] | None = None) -> Iterator[None]:
  """Within it, layers beside which `tap_shapes` arrays stand carry taps.

  Args:
    note: if given, called whenever the backward pass of a tap is traced, with
      the last dimension of the layer's trial array and the number of the call.
  """
  calls = Calls()

  def attach(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    rule = layer_rules.matching(context, args, kwargs)
    module = context.module
    if (
      rule is None
      or calls.within(module)
      or not module.has_variable("params", _ANCHOR)
    ):
      return next_fun(*args, **kwargs)
    number = calls.next(module)
    y: Any = calls.around(module, next_fun, *args)
    # An output that is the same for all examples (of positions, say) would get
    # the sum of their gradients: a zero per example tells them apart.
    y = y + jnp.asarray(module.get_variable("params", _ANCHOR), y.dtype)
    rows = rule.output_rows(module, y)
    x = rule.flatten(module, jnp.asarray(args[0]))
    if x is None:
      raise AssertionError("the survey leaves such layers alone")
    x = jax.lax.stop_gradient(x)
    if rule.kind == "lookup":
      x = x.astype(jnp.float32)  # ids have no gradient to travel as
    heard: Callable[[], None] = _silent
    if note is not None:
      trial: Any = module.get_variable("params", _TRIAL)
      heard = functools.partial(note, trial.shape[-1], number)
    rows = _tap(module, rule.kind, number, x, rows, heard)
    return rule.output_of(module, rows, y.shape)

  with nn.intercept_methods(attach):
    yield


def _tap(
  module: Any,
  kind: str,
  number: int,
  x: jax.Array,
  y: jax.Array,
  heard: Callable[[], None],
) -> jax.Array:
  """The tap whose zeros stand beside the weight."""

  def zero(name: str) -> Any:
    return module.get_variable("params", name)

  x_name, y_name = f"dptrain_inputs_{number}", f"dptrain_outputs_{number}"
  if module.has_variable("params", _SUM):
    return backward_rules.weighted(kind, x, y, zero(_SCALE), zero(_SUM))
  if module.has_variable("params", _SQUARES) and number == 0:
    return backward_rules.squares(kind, x, y, zero(_SQUARES))
  if not module.has_variable("params", y_name):
    raise RuntimeError(
      f"{type(module).__name__} {'/'.join(module.path)} was called more often"
      " than when it was surveyed; use method 'vmap' for this model."
    )
  if module.has_variable("params", x_name):
    return backward_rules.both(heard, x, y, zero(x_name), zero(y_name))
  return backward_rules.gradient(y, zero(y_name))


def sharing_within(uses: tuple[Use, ...]) -> tuple[Use, ...]:
  """Gives own taps to layers that share the input of one that is left out."""
  names = {use.name for use in uses}
  return tuple(
    use if use.same_inputs in names else use._replace(same_inputs=None)
    for use in uses
  )


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
    g = handed_out[y_name]
    lead = g.shape[0], math.prod(use.stack), math.prod(use.outputs[:-1])
    if use.same_inputs is not None:
      inputs[use.name] = inputs[use.same_inputs]
    elif use.kind == "lookup":
      inputs[use.name] = handed_out[x_name].reshape(lead).astype(jnp.int32)
    else:
      x = handed_out[x_name]
      inputs[use.name] = x.reshape(*lead, x.shape[-1])
    result[use.name] = Captured(inputs[use.name], g.reshape(*lead, g.shape[-1]))
  return result
