"""Identities whose backward pass hands out factors of a weight's gradient.

What is handed out leaves as the "gradient" of an operand that is zero.

Shapes: d and p the weight's input and output width.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
import jax.numpy as jnp

from dptrain.clipping import products

_NAME = "dptrain_tap"


def is_tap(eqn: Any, places: list[int]) -> bool:
  """Whether an operation is a tap, and the value a zero that fits it.

  Under a vmap inside the model, a zero without the mapped axis would get the
  sum over it: then its shape is not that of what it stands for.
  """
  if not eqn.primitive.name.startswith("custom_vjp_call"):
    return False
  body = getattr(eqn.params["call_jaxpr"], "jaxpr", eqn.params["call_jaxpr"])
  if [e.params.get("name") for e in body.eqns] != [_NAME]:
    return False
  shapes = [v.aval.shape for v in eqn.invars]
  half = len(shapes) // 2
  return len(places) == 1 and all(
    place >= half and shapes[place] == shapes[place - half] for place in places
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def both(
  note: Callable[[], None],
  x: jax.Array,
  y: jax.Array,
  x_out: jax.Array,
  y_out: jax.Array,
) -> jax.Array:
  """Returns y; hands out x and the gradient g of y.

  `note` is called when the backward pass is traced: it is not where nothing
  depends on y.
  """
  del note, x, x_out, y_out
  return checkpoint_name(y, _NAME)


def _both_forward(
  note: Callable[[], None],
  x: jax.Array,
  y: jax.Array,
  x_out: jax.Array,
  y_out: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  del note, x_out, y_out
  return y, x


def _both_backward(
  note: Callable[[], None], x: jax.Array, g: jax.Array
) -> tuple[Any, ...]:
  note()
  return jnp.zeros_like(x), g, x, g


both.defvjp(_both_forward, _both_backward)


@jax.custom_vjp
def gradient(y: jax.Array, y_out: jax.Array) -> jax.Array:
  """Returns y; hands out the gradient of y."""
  del y_out
  return checkpoint_name(y, _NAME)


gradient.defvjp(lambda y, y_out: (y, None), lambda _, g: (g, g))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def squares(kind: str, x: jax.Array, y: jax.Array, out: jax.Array) -> jax.Array:
  """Returns y; hands out the squared norm of the weight's gradient."""
  del kind, x, out
  return y


def _squares_backward(
  kind: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  x, out = residuals
  x, g = _as_stored((x, g))
  rows = _rows(g)
  if kind == "lookup":
    found = products.lookup_squares(_ids(x), rows)
  else:
    found = products.squares(_rows(x), rows)
  return jnp.zeros_like(x), g, found[0].astype(out.dtype)


squares.defvjp(
  lambda kind, x, y, out: (y, (x, out)),
  _squares_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted(
  kind: str, x: jax.Array, y: jax.Array, scale: jax.Array, out: jax.Array
) -> jax.Array:
  """Returns y; hands out scale times the weight's gradient.

  Under vmap, with one `out` for all examples, that is the sum over examples,
  formed without a gradient of any one of them.
  """
  del kind, x, scale, out
  return y


def _weighted_backward(
  kind: str, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, ...]:
  x, scale, out = residuals
  x, g = _as_stored((x, g))
  total = _contraction(kind, out.shape)(scale, x, g)
  zeros = jnp.zeros_like(x), jnp.zeros_like(scale)
  return zeros[0], g, zeros[1], total.astype(out.dtype)


weighted.defvjp(
  lambda kind, x, y, scale, out: (y, (x, scale, out)),
  _weighted_backward,
)


@functools.cache
def _contraction(kind: str, shape: tuple[int, ...]) -> Callable[..., Any]:
  """The weighted gradient; under vmap, its sum over the mapped axis."""

  def over(scale: jax.Array, x: jax.Array, g: jax.Array) -> jax.Array:
    rows = math.prod(g.shape[1:-1])
    if kind == "lookup":
      ids = x.reshape(len(scale), 1, rows).astype(jnp.int32)
      g = g.reshape(len(scale), 1, rows, g.shape[-1])
      return products.weighted_lookup(scale, ids, g, shape[0])[0]
    x, g = (a.reshape(len(scale), 1, rows, a.shape[-1]) for a in (x, g))
    left, right = (x, g) if kind == "product" else (g, x)
    return products.weighted_product(scale, left, right)[0]

  @custom_vmap
  def one(scale: jax.Array, x: jax.Array, g: jax.Array) -> jax.Array:
    return over(scale[None], x[None], g[None])

  @one.def_vmap
  def _(size: int, mapped: Any, *args: jax.Array) -> tuple[jax.Array, bool]:
    each = [
      a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
      for a, is_mapped in zip(args, mapped, strict=True)
    ]
    return over(*each), False

  return one


def _as_stored(factors: Any) -> Any:
  """Rounds to the dtype, which a compiler may otherwise skip in places."""
  return jax.lax.optimization_barrier(factors)


def _rows(x: jax.Array) -> jax.Array:
  """[..., d] -> [1, 1, T, d]."""
  return x.reshape(1, 1, math.prod(x.shape[:-1]), x.shape[-1])


def _ids(x: jax.Array) -> jax.Array:
  return x.reshape(1, 1, x.size).astype(jnp.int32)
