"""Einsum and Conv, which are products of matrices in most of their forms."""

from clipped_models import D
from clipped_models import T
from clipped_models import case
from clipped_models import scanned
import flax.linen as nn
import jax
import jax.numpy as jnp


def joined(outputs):
  return jnp.concatenate([y.reshape(1, -1) for y in outputs], axis=1)


def joined_einsums(x, equations):
  start = nn.initializers.normal()
  return joined(
    nn.Einsum(shape, text, kernel_init=start)(x)
    for text, shape in equations.items()
  )


@case(9)
class Einsums(nn.Module):
  @nn.compact
  def __call__(self, x):
    equations = {
      "btd,de->bte": (D, 3),
      "btd,hde->bthe": (2, D, 3),
      "btd,dhe->bhte": (D, 2, 3),
      "b t d, e d t -> b e": (3, D, T),
      "...d,de->...e": (D, 2),
      "b...d,ed->eb...": (2, D),
      "btd,e->bted": (2,),
      "btd,td->b": (T, D),
    }
    y = joined_einsums(x, equations)
    layer = nn.Einsum((D, D), "btd,ed->bte", use_bias=False)
    return joined([y, layer(x)])


@case(3)
class EinsumTwiceAndScanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    class Body(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        layer = nn.Einsum((2, D, 3), "...d,hde->...he")
        return jnp.tanh(layer(x)).reshape(x.shape), None

    layer = nn.Einsum((D, D), "...d,ed->...e")
    return layer(scanned(Body, 2)()(jnp.tanh(layer(x)), None)[0])


@case(0)
class EinsumsThatAreNoProducts(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = joined_einsums(
      x,
      {
        "btd,tde->bte": (T, D, 2),  # t is everywhere
        "btd,de->be": (D, 2),  # t is summed before
        "btd,def->bte": (D, 2, 3),  # f is summed before
      },
    )
    one = nn.Einsum((D, 2), "btd,de->bte")(x[..., :1])  # broadcast
    late = nn.Einsum((D, 2))(x, "btd,de->bte")

    def twice(*args, dtype=None):
      return [None if a is None else 2 * a for a in args]

    own = nn.Einsum((D, 2), "btd,de->bte", promote_dtype=twice)(x)
    return joined([y, one, late, own])


@case(10)
class Convolutions(nn.Module):
  """One dimension: every padding, strides and dilations."""

  @nn.compact
  def __call__(self, x):
    x = jnp.concatenate([x, jnp.sin(3 * x)], axis=1)
    return joined(
      nn.Conv(2, size, padding=padding, **more)(x)
      for size, padding, more in (
        (3, "SAME", {}),
        (2, "VALID", {"strides": 2}),
        ((3,), "CIRCULAR", {"kernel_dilation": 2}),
        ((4,), "REFLECT", {"use_bias": False}),
        (3, "CAUSAL", {"kernel_dilation": 2, "strides": 3}),
        (2, 1, {"input_dilation": 2}),
        (3, [(0, 2)], {"strides": (2,), "kernel_dilation": (2,)}),
        (2, [(-1, -2)], {}),
        (2, "SAME", {"strides": 3, "kernel_dilation": 3}),
        (1, "SAME", {}),
      )
    )


@case(4)
class ConvolutionsOfMoreDimensions(nn.Module):
  @nn.compact
  def __call__(self, x):
    plane = x.reshape(1, T, 3, 2)
    deep = x.reshape(1, 2, 2, 2, 3, 1)  # two batch axes
    return joined(
      [
        nn.Conv(2, (3, 2), strides=(2, 1))(plane),
        nn.Conv(2, (2, 3), padding=[(1, 0), (0, 2)])(plane[0]),  # no batch axis
        nn.Conv(2, (2, 2, 2), kernel_dilation=(1, 2, 1))(deep[:, 0]),
        nn.Conv(2, (2, 3, 1), padding="CIRCULAR")(deep),
      ]
    )


@case(4)
class ConvolutionTwiceAndScanned(nn.Module):
  """And a second one with the same patches as the first."""

  @nn.compact
  def __call__(self, x):
    class Body(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return jnp.tanh(nn.Conv(D, (3,))(x)), None

    x, _ = scanned(nn.remat(Body), 2)()(x, None)
    layer = nn.Conv(D, (2,))
    gate = nn.Conv(D, (2,))(x)
    return layer(jnp.tanh(layer(x))) * gate


@case(0)
class ConvolutionsThatAreNoProducts(nn.Module):
  @nn.compact
  def __call__(self, x):
    def doubled(*args, **kwargs):
      return 2 * jax.lax.conv_general_dilated(*args, **kwargs)

    mask = jnp.arange(2 * D * 2).reshape(2, D, 2) % 2.0
    return joined(
      [
        nn.Conv(4, (2,), feature_group_count=2)(x),
        nn.Conv(2, (2,), mask=mask)(x),
        nn.Conv(2, (2,), conv_general_dilated=doubled)(x),
        nn.ConvLocal(2, (2,))(x),
        nn.ConvTranspose(2, (2,))(x),
      ]
    )
