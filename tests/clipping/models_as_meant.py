"""Layers and losses used as they are meant: taps stand for the weights."""

from clipped_models import D
from clipped_models import Step
from clipped_models import T
from clipped_models import V
from clipped_models import case
from clipped_models import initial
from clipped_models import of_model
from clipped_models import read_out
from clipped_models import reals
from clipped_models import scanned
from flax.core import freeze
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@case(3)
class SharedTwice(nn.Module):
  @nn.compact
  def __call__(self, x):
    shared = nn.Dense(D)
    return shared(jnp.tanh(shared(x))) + nn.Dense(D)(x)


@case(1)
class Scan(nn.Module):
  @nn.compact
  def __call__(self, x):
    return scanned(nn.remat(Step), 3)()(x, None)[0]


@case(1)
class RematOutsideScan(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.remat(scanned(Step, 3))()(x, None)[0]


@case(1)
class RematPolicy(nn.Module):
  @nn.compact
  def __call__(self, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return scanned(nn.remat(Step, policy=policy), 2)()(x, None)[0]


@case(2)
class UnrolledAndLengthOne(nn.Module):
  @nn.compact
  def __call__(self, x):
    x, _ = scanned(Step, 4, unroll=2)(name="unrolled")(x, None)
    return scanned(Step, 1)(name="one")(x, None)[0]


@case(1)
class NestedScans(nn.Module):
  @nn.compact
  def __call__(self, x):
    return scanned(scanned(Step, 2), 2)()(x, None)[0]


@case(7)
class AttentionAndEinsum(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    y += nn.Einsum((D, D), "btd,de->bte")(x)
    return y + nn.RMSNorm()(nn.Conv(D, (3,))(nn.Dense(D)(x)))


@case(4)
class DenseGeneral(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.DenseGeneral((2, 3), axis=(-2, -1))(x)
    y = y.reshape(*y.shape[:1], 1, D)
    y += (
      nn.DenseGeneral(D, axis=1)(x)
      + nn.DenseGeneral((3, 2))(x).reshape(*x.shape[:-1], D)[:, :1]
    )
    y += nn.DenseGeneral(D, axis=(2, 1))(x)[:, None]  # kernel [D, T, D]: left
    y += nn.DenseGeneral(D, batch_dims=(0,), axis=2)(x)[:, :1]  # left, too
    return y + nn.Dense(D)(x)[:, :1]


@case(4)
class TiedTwice(nn.Module):
  of_ids = True

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(V, D)
    y = nn.Dense(D)(embed(x)) + embed(x[:, ::-1])
    return embed.attend(jnp.tanh(y))


@case(2)
class Positions(nn.Module):
  """Ids and outputs that are the same for all examples."""

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(T, D)
    return x * (1 + embed(jnp.arange(T)) + embed(np.arange(T)[::-1])[None])


@case(2)
class ConstantInput(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Dense(D)(jnp.ones((2, D)))
    return x * nn.Dense(D)(jnp.tanh(y)).sum(0)


@case(1)
class NegativeIds(nn.Module):
  """-1 and the last row are the same row."""

  of_ids = True

  @nn.compact
  def __call__(self, x):
    return nn.Embed(V, D)(jnp.where(x < 2, -1, jnp.where(x < 3, V - 1, x)))


@case(1)
class IdsOutOfRange(nn.Module):
  of_ids = True

  @nn.compact
  def __call__(self, x):
    y = nn.Embed(V, D)(jnp.where(x < 2, V + 5, x).astype(jnp.uint8))
    return jnp.where(x[..., None] < 2, 0.0, y)


@case(1)
class OneRow(nn.Module):
  """Flax ignores the ids of an embedding of one row."""

  of_ids = True

  @nn.compact
  def __call__(self, x):
    return nn.Embed(1, D)(x) * (1.0 + x[..., None])


@case(1)
class IntegerInput(nn.Module):
  of_ids = True

  @nn.compact
  def __call__(self, x):
    return nn.Dense(D)(jax.nn.one_hot(x, V, dtype=jnp.int32))


@case(1)
class NnJit(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.jit(nn.Dense)(D)(x)


@case(2)
class StopGradient(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Dense(D)(jax.lax.stop_gradient(jnp.tanh(nn.Dense(D)(x))))
    return y * x


@case(3)
class SharedInputBehindStopGradient(nn.Module):
  """No gradient enters the first of three layers with one input."""

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(x)
    first = jax.lax.stop_gradient(nn.Dense(D)(x))
    return first * nn.Dense(D)(x) + nn.Dense(D)(x)


@case(2)
class TableReadWithoutGradient(nn.Module):
  """Which rows are looked up, and what with, follows from the whole table."""

  of_ids = True

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(V, D)
    y, seen = embed(x), jax.lax.stop_gradient(embed.embedding)
    far = jnp.argmin(jax.lax.stop_gradient(y) @ seen.T, axis=-1)
    return embed(far) * jnp.tanh(y @ seen.T @ seen)


@case(2)
class SharedInputInsideAScan(nn.Module):
  """One input, met in every step of a scan and again outside."""

  @nn.compact
  def __call__(self, x):
    class Body(nn.Module):
      @nn.compact
      def __call__(self, carry, _):
        return jnp.tanh(nn.Dense(D)(x)) + carry, None

    y, _ = scanned(Body, 2)()(x, None)
    return y * nn.Dense(D)(x)


@case(2)
class SameInputTwoAxes(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = jnp.concatenate([x, x[:, :2]], axis=1)  # square
    return nn.DenseGeneral(D)(x) * nn.DenseGeneral(D, axis=-2)(x)


@case(2)
class PassedToTwoParents(nn.Module):
  @nn.compact
  def __call__(self, x):
    class Parent(nn.Module):
      layer: nn.Module

      @nn.compact
      def __call__(self, x):
        return jnp.tanh(self.layer(x))

    shared = nn.Dense(D)
    return Parent(shared)(x) + Parent(shared)(2 * x)


@case(4)
class SharedInputOfALayerUsedTwice(nn.Module):
  """The first to see an input is used once, the second one twice."""

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(x)
    once, twice = nn.Dense(D)(x), nn.Dense(D)
    return once * twice(x) * twice(jnp.tanh(once)) * nn.Dense(D)(x)


@case(7)
class BothKindsOfSecondPass(nn.Module):
  """Two passes leave the factors of some weights and add up the rest.

  Of the layers with one input, the first is of one kind, the next of the other.
  """

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Dense(D)(x))
    y = nn.Dense(D)(jnp.tanh(x)) * nn.Dense(D)(jnp.tanh(x))
    pooled = jnp.tanh(x).mean(axis=1)
    narrow, wide = nn.Dense(2, name="narrow"), nn.Dense(64, name="wide")
    pooled = jnp.concatenate([pooled, narrow(pooled), wide(pooled)], axis=1)
    twice = nn.Dense(pooled.shape[1], name="twice")
    return jnp.concatenate([y.reshape(1, -1), twice(twice(pooled))], axis=1)


@case(1)
class CustomGradientAfterwards(nn.Module):
  @nn.compact
  def __call__(self, x):
    return times_three_backwards(nn.Dense(D)(x))


@jax.custom_vjp
def times_three_backwards(y):
  return y


times_three_backwards.defvjp(lambda y: (y, None), lambda _, g: (3 * g,))


@case(1)
def one_of_many_outputs_unused():
  """A layer whose output goes nowhere, beside one that counts."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      nn.Dense(4, name="unused")(x)
      return nn.Dense(D)(x)

  return of_model(Model)


@case(2)
def dropout_and_mask():
  """Every example draws the same dropout under all methods."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
      x = nn.Dropout(0.5, deterministic=False)(nn.Dense(D)(x))
      return nn.Dense(D)(nn.relu(x)) * mask[..., None]

  model, x = Model(), reals()
  mask = np.arange(T) < np.asarray([[1], [3], [4]])

  def losses(params, batch, keys):
    def one(x, mask, key):
      rngs = {"dropout": key}
      return model.apply({"params": params}, x[None], mask[None], rngs=rngs)[0]

    y = one(batch["x"][0], batch["mask"][0], keys[0])[None]
    return read_out(y, 1), {"mean": jnp.mean(y, axis=(1, 2))}

  params = initial(model, x[:1], mask[:1])
  return losses, params, {"x": x, "mask": mask}


@case(2)
def frozen_parameters():
  losses, params, batch = of_model(StopGradient)

  def of_frozen(params, batch, keys):
    return losses(params.unfreeze(), batch, keys)

  return of_frozen, freeze(params), batch


@case(1)
def a_subtree_is_applied():
  model, x = nn.Dense(D), reals()

  def losses(params, batch, keys):
    y = params["scale"] * batch + model.apply(
      {"params": params["body"]["dense"]}, batch
    )
    return read_out(y, batch.shape[0]), {}

  params = {
    "body": {"dense": initial(model, x), "nothing": {}},
    "scale": np.ones(D, np.float32),
    "none": None,
  }
  return losses, params, x


@case(1)
def users_own_scan_over_stacked_layers():
  model, x = nn.Dense(D), reals()

  def losses(params, batch, keys):
    def step(x, one):
      return jnp.tanh(model.apply({"params": one}, x)), None

    y, _ = jax.lax.scan(step, batch, params, reverse=True)
    return read_out(y, batch.shape[0]), {}

  params = {"kernel": reals((3, D, D), 1) / 2, "bias": reals((3, D), 2)}
  return losses, params, x


@case(1)
def jitted_loss():
  losses, params, batch = of_model(NnJit)
  return jax.jit(losses), params, batch


@case(1)
def checkpointed_loss():
  losses, params, batch = of_model(Scan)
  return jax.checkpoint(losses), params, batch


@case(1)
def half_precision_parameters():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(D, param_dtype=jnp.float16, dtype=jnp.float32)(x)

  return of_model(Model)


@case(2)
def auxiliary_head():
  """A layer that shares its input feeds nothing but metrics."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(D, name="a")(x), nn.Dense(D, name="b")(x)

  model, x = Model(), reals()

  def losses(params, batch, keys):
    seen, used = model.apply({"params": params}, batch)
    return read_out(used, batch.shape[0]), {"mean": jnp.mean(seen, (1, 2))}

  return losses, initial(model, x[:1]), x
