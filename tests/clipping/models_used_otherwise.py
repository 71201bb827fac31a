"""Modules that use a weight beside its layer: no tap may stand for it."""

from clipped_models import D
from clipped_models import Step
from clipped_models import T
from clipped_models import case
from clipped_models import scanned
import flax.linen as nn
import jax
import jax.numpy as jnp


@case(0)
class RawUse(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(D)
    return dense(x) @ dense.variables["params"]["kernel"]


@case(0)
class BroadcastScan(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      lambda module, x, _: (jnp.tanh(module(x)), None),
      variable_broadcast="params",
      split_rngs={"params": False},
      length=3,
    )
    return scan(nn.Dense(D), x, None)[0]


@case(0)
class ScanOverAxisOne(nn.Module):
  @nn.compact
  def __call__(self, x):
    return scanned(Step, D, axis=1)()(x, None)[0]


@case(0)
class VmapWithBroadcastParams(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.vmap(
      nn.Dense,
      variable_axes={"params": None},
      split_rngs={"params": False},
      in_axes=1,
      out_axes=1,
    )(D)(x)


def _vmapped_dense(axis, size, in_axes):
  return nn.vmap(
    nn.Dense,
    variable_axes={"params": axis},
    split_rngs={"params": True},
    in_axes=in_axes,
    out_axes=in_axes or 0,
    axis_size=size,
  )(D)


@case(0)
class VmapWithParams(nn.Module):
  @nn.compact
  def __call__(self, x):
    return _vmapped_dense(0, T, 1)(x) + _vmapped_dense(0, 2, None)(x).sum(0)


@case(0)
class VmapWithParamsOverAxisOne(nn.Module):
  """All axes have one length, so that shapes tell nothing."""

  @nn.compact
  def __call__(self, x):
    x = jnp.concatenate([x, x[:, :2]], axis=1)  # [1, D, D]
    return _vmapped_dense(1, D, 0)(jnp.transpose(x, (1, 2, 0))[..., None] * x)


@case(0)
class WeightNorm(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.WeightNorm(nn.Dense(D))(x)


@case(0)
class Cond(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.cond(
      jnp.sum(x) > 0, lambda m, x: m(x), lambda m, x: -m(x), nn.Dense(D), x
    )


@case(0)
class OwnPromotion(nn.Module):
  """promote_dtype may do anything to the weight."""

  @nn.compact
  def __call__(self, x):
    def promote(*args, dtype=None, **kwargs):
      del dtype, kwargs
      return [None if a is None else 3 * a for a in args]

    return nn.Dense(D, promote_dtype=promote)(x)


@case(0)
class OwnDotGeneral(nn.Module):
  @nn.compact
  def __call__(self, x):
    def twice(*args, **kwargs):
      return 2 * jax.lax.dot_general(*args, **kwargs)

    return nn.Dense(D, dot_general=twice)(x)


@case(0)
class Subclass(nn.Module):
  @nn.compact
  def __call__(self, x):
    class Doubled(nn.Dense):
      @nn.compact
      def __call__(self, x):
        return 2 * super().__call__(3 * x)

    return Doubled(D)(x)


@case(0)
class KeywordArguments(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(D)(inputs=x)


@case(0)
class OneCallWithAKeyword(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(D)
    return dense(jnp.tanh(dense(inputs=x)))


@case(0)
class InterceptedInside(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(D)

    def outer(next_fun, args, kwargs, context):
      y = next_fun(*args, **kwargs)
      return 2 * y if isinstance(context.module, nn.Dense) else y

    # It stands between the tap and the layer.
    with nn.intercept_methods(outer):
      return dense(x)
