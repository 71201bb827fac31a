"""Reading off a traced program what a value is used for.

While a model is surveyed, a stand-in takes the place of each layer's output: an
operation of its own, whose operands are the layer's input and its weight. A
weight whose only way into the program is through such stand-ins is used by
these layers and by nothing else. (What reads it behind `stop_gradient` adds
nothing to its gradient, and may.) Differentiating a stand-in shows as well: the
derivative of a layer with respect to its input is another use of the weight.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.core.primitives import stop_gradient_p
from jax.interpreters import ad
from jax.interpreters import batching
import jax.numpy as jnp

# Operations that run their body once, on their operands as they are.
_TRANSPARENT = ("jit", "pjit", "checkpoint", "remat", "remat2")

_layer_p = Primitive("dptrain_layer")
_other_use_p = Primitive("dptrain_other_use")


@_layer_p.def_abstract_eval
def _(x: Any, weight: Any, *, shape: Any, dtype: Any, number: int) -> Any:
  del x, weight, number
  return jax.core.ShapedArray(shape, dtype)


@_other_use_p.def_abstract_eval
def _(weight: Any) -> Any:
  del weight
  return jax.core.ShapedArray((), jnp.dtype(jnp.float32))


def _differentiated(
  primals: tuple[Any, ...], tangents: tuple[Any, ...], **params: Any
) -> tuple[Any, Any]:
  y = _layer_p.bind(*primals, **params)
  moved = [jnp.sum(t) for t in tangents if not isinstance(t, ad.Zero)]
  moved = [m.astype(jnp.float32) * other_use(primals[1]) for m in moved]
  tangent = sum(moved[1:], start=moved[0]).astype(y.dtype)
  return y, jnp.broadcast_to(tangent, y.shape)


def _batched(args: Any, dims: Any, *, shape: Any, **params: Any) -> Any:
  sizes = {
    arg.shape[dim]
    for arg, dim in zip(args, dims, strict=True)
    if dim is not batching.not_mapped
  }
  shape = (sizes.pop(), *shape)
  x, weight = args
  if dims[1] is batching.not_mapped:
    return _layer_p.bind(x, weight, shape=shape, **params), 0
  # A weight per step of a vmap: nothing says along which of its axes.
  value = other_use(weight).astype(params["dtype"])
  return jnp.broadcast_to(value, shape), 0


ad.primitive_jvps[_layer_p] = _differentiated
batching.primitive_batchers[_layer_p] = _batched
ad.primitive_jvps[_other_use_p] = lambda primals, _: (
  other_use(*primals),
  ad.Zero(jax.core.ShapedArray((), jnp.dtype(jnp.float32))),
)
batching.primitive_batchers[_other_use_p] = lambda args, _: (
  other_use(*args),
  batching.not_mapped,
)


def layer(x: Any, weight: jax.Array, like: jax.Array, number: int) -> jax.Array:
  """Stands in for the output `like` of a layer whose weight has a number."""
  return _layer_p.bind(
    jnp.asarray(x), weight, shape=like.shape, dtype=like.dtype, number=number
  )


def other_use(weight: jax.Array) -> jax.Array:
  """A use of a weight that is none of its layer's."""
  return _other_use_p.bind(weight)


def layers_met(jaxpr: Any, var: Any, number: int) -> int | None:
  """How many stand-ins of this number a weight meets; None if anything else."""
  return meetings(
    jaxpr,
    var,
    lambda eqn, places: (
      eqn.primitive is _layer_p
      and eqn.params["number"] == number
      and places == [1]
    ),
  )


def meetings(
  jaxpr: Any, var: Any, expected: Callable[[Any, list[int]], bool]
) -> int | None:
  """Counts how often a value meets what is expected.

  In a scan, the value must be cut along the steps: what all steps share would
  get the sum of their gradients. What is cut off by `stop_gradient` has no
  gradient to sum, and does not count.

  Args:
    jaxpr: the program.
    var: one of its variables.
    expected: (operation, places of the value among its operands) -> whether it
      is one to count.

  Returns:
    The count; None if the value meets anything else, or is an output.
  """
  if any(v is var for v in jaxpr.outvars):
    return None
  total = 0
  for eqn in jaxpr.eqns:
    places = [i for i, v in enumerate(eqn.invars) if v is var]
    if not places or eqn.primitive is stop_gradient_p:
      continue
    if expected(eqn, places):
      total += 1
      continue
    body = _body(eqn, places)
    if body is None:
      return None
    for place in places:
      found = meetings(body, body.invars[place], expected)
      if found is None:
        return None
      total += found
  return total


def _body(eqn: Any, places: list[int]) -> Any | None:
  name = eqn.primitive.name
  if name == "scan":
    first = eqn.params["num_consts"] + eqn.params["num_carry"]
    if min(places) < first and eqn.params["length"] != 1:
      return None
  elif name not in _TRANSPARENT:
    return None
  body = eqn.params["jaxpr"]
  return getattr(body, "jaxpr", body)
