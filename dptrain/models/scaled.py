"""A model whose gradients are divided by some of its parameters.

Half of scale-then-privatise (arXiv 2507.01129); the other half, which decides
what to divide by, is `dptrain.optimizers.scale_then_privatise`. What divides
stands among the parameters, so that everything between the two (clipping, sums,
noise, meshes, checkpoints) is what it is for any model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.models import masked_lm

MODEL, DIVISORS = "model", "divisors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledModel(masked_lm.MaskedLanguageModel):
  """A model beside whose parameters stand their gradients' divisors.

  Parameters: {"model": those of `base`, "divisors": a tree like it}. Losses are
  those of `base`, to the bit. With g an example's gradient by the parameters of
  `base` and d the divisors, its gradient by "model" is g / d, and by "divisors"
  it is 0. Train it with the optimizer `scale_then_privatise`; any other would
  let noise move the divisors.

  Formal guarantee: unit: one example. Clipping sees the whole of what it is
  given, (g / d, 0), so its bound holds for any d. d is made of earlier releases
  (`scale_then_privatise`), as the parameters are: each update is the same
  Gaussian mechanism as without, on a query chosen by what was released before,
  which is what DP-SGD's composition allows. Public: d, once released.

  No layer's tap covers a parameter that was touched on its way to the layer
  (`clipping.survey`), so every method clips per-example copies here, at the
  memory of "vmap".

  Attributes:
    bert: that of `base`.
    base: the model whose gradients are scaled.
  """

  bert: Any = dataclasses.field(init=False)
  base: masked_lm.MaskedLanguageModel

  def __post_init__(self) -> None:
    object.__setattr__(self, "bert", self.base.bert)

  def init(self, key: jax.Array) -> masked_lm.Params:
    """Draws the parameters of `base`; all divisors are 1."""
    params = self.base.init(key)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    return {MODEL: params, DIVISORS: ones}

  @property
  def bare(self) -> masked_lm.MaskedLanguageModel:
    """That of `base`."""
    return self.base.bare

  def bare_params(self, params: masked_lm.Params) -> masked_lm.Params:
    """Those of `base`."""
    return self.base.bare_params(params[MODEL])

  def logical_axes(self) -> dict[str, Any]:
    """Those of `base`, twice."""
    axes = self.base.logical_axes()
    return {MODEL: axes, DIVISORS: axes}

  def losses(
    self,
    params: masked_lm.Params,
    batch: masked_lm.Batch,
    keys: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `base`."""
    return self.base.losses(
      jax.tree.map(_with_divided_gradient, params[MODEL], params[DIVISORS]),
      batch,
      keys,
    )


@jax.custom_vjp
def _with_divided_gradient(x: jax.Array, divisor: jax.Array) -> jax.Array:
  """`x`, whose gradient will be divided."""
  del divisor
  return x


def _forward(x: jax.Array, divisor: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x, divisor


def _backward(
  divisor: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  scaled = (gradient / divisor).astype(gradient.dtype)
  return scaled, jnp.zeros_like(divisor)


_with_divided_gradient.defvjp(_forward, _backward)
