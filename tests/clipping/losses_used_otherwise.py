"""Losses that use a weight beside its layer: no tap may stand for it."""

from clipped_models import D
from clipped_models import case
from clipped_models import initial
from clipped_models import of_model
from clipped_models import read_out
from clipped_models import reals
import flax.linen as nn
import jax
import jax.numpy as jnp
from models_as_meant import NnJit
from models_as_meant import Scan
from models_as_meant import SharedTwice
from models_as_meant import StopGradient
from models_as_meant import times_three_backwards


@case(0)
def gradient_penalty():
  """The derivative of a layer is another use of its weight."""
  model, x = nn.Dense(D), reals()

  def losses(params, batch, keys):
    def energy(x):
      return jnp.sum(jnp.tanh(model.apply({"params": params}, x)))

    return jnp.sum(jnp.square(jax.grad(energy)(batch)), axis=(1, 2)), {}

  return losses, initial(model, x[:1]), x


@case(0)
def jacobian_vector_product_through_scan():
  losses, params, x = of_model(Scan)

  def of_product(params, batch, keys):
    loss, change = jax.jvp(
      lambda x: losses(params, x, keys)[0], (batch,), (jnp.ones_like(batch),)
    )
    return loss + change**2, {}

  return of_product, params, x


@case(0)
def adversarial_perturbation():
  losses, params, x = of_model(SharedTwice)

  def of_perturbed(params, batch, keys):
    step = jax.grad(lambda x: jnp.sum(losses(params, x, keys)[0]))(batch)
    return losses(params, batch + step, keys)

  return of_perturbed, params, x


@case(0)
def custom_vjp_around_the_layer():
  model, x = nn.Dense(D), reals()

  @jax.custom_vjp
  def layer(params, x):
    return model.apply({"params": params}, x)

  def forward(params, x):
    return layer(params, x), (params, x)

  def backward(kept, g):
    _, pull = jax.vjp(lambda p, x: model.apply({"params": p}, x), *kept)
    return pull(5 * g)

  layer.defvjp(forward, backward)
  return (
    lambda p, b, k: (read_out(layer(p, b), b.shape[0]), {}),
    initial(model, x[:1]),
    x,
  )


@case(0)
def custom_jvp_around_the_layer():
  model, x = nn.Dense(D), reals()

  @jax.custom_jvp
  def layer(params, x):
    return model.apply({"params": params}, x)

  @layer.defjvp
  def _(primals, tangents):
    params, x = primals
    change = x @ tangents[0]["kernel"] + tangents[1] @ params["kernel"]
    return layer(params, x), 7 * change

  return (
    lambda p, b, k: (read_out(layer(p, b), b.shape[0]), {}),
    initial(model, x[:1]),
    x,
  )


@case(0)
def custom_vjp_on_the_weight():
  losses, params, x = of_model(NnJit)

  def of_steered(params, batch, keys):
    return losses(jax.tree.map(times_three_backwards, params), batch, keys)

  return of_steered, params, x


@case(0)
def straight_through_rounding():
  """What is cut off is no use; what stands beside it is."""
  losses, params, x = of_model(NnJit)

  def rounded(w):
    return w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w)

  return (
    lambda p, b, k: losses(jax.tree.map(rounded, p), b, k),
    params,
    x,
  )


@case(0)
def scaled_parameters():
  losses, params, x = of_model(SharedTwice)
  return (
    lambda p, b, k: losses(jax.tree.map(lambda w: 2 * w, p), b, k),
    params,
    x,
  )


@case(0)
def weight_decay_in_the_loss():
  losses, params, x = of_model(SharedTwice)

  def decayed(params, batch, keys):
    found, aux = losses(params, batch, keys)
    leaves = jax.tree.leaves(params)
    return found + 0.1 * sum(jnp.mean(jnp.cosh(w)) for w in leaves), aux

  # The shape of the tree must not change what is lost.
  def of_known(params, batch, keys):
    known = {k: {n: params[k][n] for n in ("kernel", "bias")} for k in params}
    return decayed(known, batch, keys)

  return of_known, params, x


@case(0)
def two_applications_of_the_same_parameters():
  losses, params, x = of_model(NnJit)

  def twice(params, batch, keys):
    return (
      losses(params, batch, keys)[0] * losses(params, 2 * batch, keys)[0],
      {},
    )

  return twice, params, x


@case(0)
def two_applications_with_an_unused_call():
  """As many calls as numbers, though not the same ones."""

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      dense = nn.Dense(D)
      y = dense(x)
      dense(jnp.tanh(y))  # thrown away
      return y

  class Once(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(D)(x)

  first, x = Twice(), reals()
  once = Once()

  def losses(params, batch, keys):
    y = first.apply({"params": params}, batch)
    y = once.apply({"params": params}, jnp.tanh(y))
    return read_out(y, batch.shape[0]), {}

  return losses, initial(first, x[:1]), x


@case(0)
def users_own_loop_over_one_layer():
  model, x = nn.Dense(D), reals()

  def losses(params, batch, keys):
    def row(x):
      return model.apply({"params": params}, x)

    y = jax.lax.map(row, jnp.swapaxes(batch, 0, 1))
    y = jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(row(y)), y)
    return read_out(jnp.swapaxes(y, 0, 1), batch.shape[0]), {}

  return losses, initial(model, x[:1]), x


@case(0)
def users_own_vmap_over_tokens():
  model, x = nn.Dense(D), reals()

  def losses(params, batch, keys):
    y = jax.vmap(lambda x: model.apply({"params": params}, x))(batch)
    return read_out(y, batch.shape[0]), {}

  return losses, initial(model, x[:1]), x


@case(0)
def kernels_swapped_between_layers():
  losses, params, x = of_model(StopGradient)

  def swapped(params, batch, keys):
    a, b = params["Dense_0"], params["Dense_1"]
    other = {
      "Dense_0": {**a, "kernel": b["kernel"]},
      "Dense_1": {**b, "kernel": a["kernel"]},
    }
    return losses(other, batch, keys)

  return swapped, params, x


@case(1)
def the_weight_of_another_layer():
  losses, params, x = of_model(StopGradient)

  def tied(params, batch, keys):
    found, aux = losses(params, batch, keys)
    return found + jnp.sum(params["Dense_1"]["kernel"] ** 2), aux

  return tied, params, x


@case(0)
def one_step_of_inner_training():
  """The loss after a gradient step, differentiated through the step."""
  losses, params, x = of_model(SharedTwice)

  def after(params, batch, keys):
    def inner(params):
      return jnp.sum(losses(params, batch, keys)[0])

    slope = jax.grad(inner)(params)
    size = sum(jnp.sum(g**2) for g in jax.tree.leaves(slope))
    return losses(params, batch, keys)[0] * size, {}

  return after, params, x


@case(0)
def switched_layers():
  """Layers dropped at random, by `lax.cond`."""
  model, x = nn.Dense(D), reals()

  def losses(params, batch, keys):
    keep = jax.random.bernoulli(keys[0])
    y = jax.lax.cond(
      keep, lambda x: model.apply({"params": params}, x), lambda x: x, batch
    )
    return read_out(y, batch.shape[0]), {}

  return losses, initial(model, x[:1]), x
