"""Models and losses that could fool a tap, and what taps must make of them.

Each case is a function that returns (loss_fn, params, batch). `USES` says how
many uses are tapped: 0 where only per-example copies are right.
"""

import functools

from flax.core import freeze
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dptrain.clipping import methods
from dptrain.clipping import rules

# Compiles tiny programs in half the time.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
B, T, D, V = 3, 4, 6, 9
CASES = {}
USES = {}
TOLERANCE = {"half_precision_parameters": 1e-3}


def case(uses):
  """Adds a function to the cases, or the model class that it is to try."""

  def add(built):
    name = built.__name__.lower().lstrip("_")
    CASES[name] = (
      functools.partial(of_model, built) if (isinstance(built, type)) else built
    )
    USES[name] = uses
    return built

  return add


def reals(shape=(B, T, D), seed=5):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def ids():
  return np.random.default_rng(3).integers(0, V // 2, (B, T), np.int32)


def read_out(y, size):
  """Nonlinear in the output, so that its gradient differs by place."""
  y = jnp.tanh(y.astype(jnp.promote_types(y.dtype, jnp.float32)))
  y = y.reshape(size, -1)
  return jnp.sum(y**2 * jnp.linspace(0.5, 1.5, y.shape[1]), axis=1)


def losses_of(model, **kwargs):
  def losses(params, batch, keys):
    del keys
    y = model.apply({"params": params}, batch, **kwargs)
    return read_out(y, batch.shape[0]), {}

  return losses


def of_model(model_type):
  model = model_type()
  batch = ids() if getattr(model_type, "of_ids", False) else reals()
  return losses_of(model), initial(model, batch[:1]), batch


def initial(model, *args, **kwargs):
  """Parameters of the right shapes, without compiling the initializers."""
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  shapes = jax.eval_shape(model.init, keys, *args, **kwargs)["params"]
  return drawn(shapes)


def drawn(shapes, seed=2):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.4 * draw.standard_normal(x.shape)).astype(x.dtype), shapes
  )


class Step(nn.Module):
  """The body of a scan."""

  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(nn.Dense(D)(x)) + x, None


def scanned(body, length, axis=0, **kwargs):
  return nn.scan(
    body,
    variable_axes={"params": axis},
    split_rngs={"params": True},
    length=length,
    **kwargs,
  )


def keys_of(batch):
  size = jax.tree.leaves(batch)[0].shape[0]
  return jax.random.split(jax.random.key(1), size)


def clipped(loss_fn, params, batch, rule=None, tried=methods.METHODS[1:]):
  """Clipped sums by method, as a function of (params, batch, is_padding)."""
  keys = keys_of(batch)
  rule = rule or rules.ClippingRule("automatic")
  uses = methods.choose(loss_fn, params, batch, keys, "one_pass").uses

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, batch, is_padding):
    return {
      method: methods.clipped_sum(
        loss_fn,
        params,
        batch,
        keys,
        is_padding,
        rule,
        methods.Choice(method, uses, ""),
      )
      for method in tried
    }

  return run, uses


def errors(loss_fn, params, batch, tried=methods.METHODS[1:]):
  """Errors of norms and of sums, against vmap; the tapped uses."""
  run, uses = clipped(loss_fn, params, batch, tried=tried)
  found = run(params, batch, np.zeros(len(keys_of(batch)), bool))
  truth = found.pop("vmap")
  result = {}
  for method, other in found.items():
    assert jax.tree.structure(other) == jax.tree.structure(truth)
    np.testing.assert_allclose(other.losses, truth.losses, rtol=2e-2)
    of_norms = relative(other.norms, truth.norms)
    flat = [
      np.concatenate(
        [np.ravel(g).astype(float) for g in jax.tree.leaves(x.gradients)]
      )
      for x in (other, truth)
    ]
    result[method] = max(
      of_norms, np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
    )
  return result, uses


def relative(found, truth):
  found, truth = np.asarray(found, float), np.asarray(truth, float)
  return float(np.max(np.abs(found - truth) / np.max(np.abs(truth))))


# --- Layers used as they are meant to be. -----------------------------------


@case(3)
class _SharedTwice(nn.Module):
  @nn.compact
  def __call__(self, x):
    shared = nn.Dense(D)
    return shared(jnp.tanh(shared(x))) + nn.Dense(D)(x)


@case(1)
class _Scan(nn.Module):
  @nn.compact
  def __call__(self, x):
    return scanned(nn.remat(Step), 3)()(x, None)[0]


@case(1)
class _RematOutsideScan(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.remat(scanned(Step, 3))()(x, None)[0]


@case(1)
class _RematPolicy(nn.Module):
  @nn.compact
  def __call__(self, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return scanned(nn.remat(Step, policy=policy), 2)()(x, None)[0]


@case(2)
class _UnrolledAndLengthOne(nn.Module):
  @nn.compact
  def __call__(self, x):
    x, _ = scanned(Step, 4, unroll=2)(name="unrolled")(x, None)
    return scanned(Step, 1)(name="one")(x, None)[0]


@case(1)
class _NestedScans(nn.Module):
  @nn.compact
  def __call__(self, x):
    return scanned(scanned(Step, 2), 2)()(x, None)[0]


@case(5)
class _AttentionAndEinsum(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    y += nn.Einsum((D, D), "btd,de->bte")(x)
    return y + nn.RMSNorm()(nn.Conv(D, (3,))(nn.Dense(D)(x)))


@case(4)
class _DenseGeneral(nn.Module):
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
class _TiedTwice(nn.Module):
  of_ids = True

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(V, D)
    y = nn.Dense(D)(embed(x)) + embed(x[:, ::-1])
    return embed.attend(jnp.tanh(y))


@case(2)
class _Positions(nn.Module):
  """Ids and outputs that are the same for all examples."""

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(T, D)
    return x * (1 + embed(jnp.arange(T)) + embed(np.arange(T)[::-1])[None])


@case(2)
class _ConstantInput(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Dense(D)(jnp.ones((2, D)))
    return x * nn.Dense(D)(jnp.tanh(y)).sum(0)


@case(1)
class _NegativeIds(nn.Module):
  """-1 and the last row are the same row."""

  of_ids = True

  @nn.compact
  def __call__(self, x):
    return nn.Embed(V, D)(jnp.where(x < 2, -1, jnp.where(x < 3, V - 1, x)))


@case(1)
class _IdsOutOfRange(nn.Module):
  of_ids = True

  @nn.compact
  def __call__(self, x):
    y = nn.Embed(V, D)(jnp.where(x < 2, V + 5, x).astype(jnp.uint8))
    return jnp.where(x[..., None] < 2, 0.0, y)


@case(1)
class _OneRow(nn.Module):
  """Flax ignores the ids of an embedding of one row."""

  of_ids = True

  @nn.compact
  def __call__(self, x):
    return nn.Embed(1, D)(x) * (1.0 + x[..., None])


@case(1)
class _IntegerInput(nn.Module):
  of_ids = True

  @nn.compact
  def __call__(self, x):
    return nn.Dense(D)(jax.nn.one_hot(x, V, dtype=jnp.int32))


@case(1)
class _NnJit(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.jit(nn.Dense)(D)(x)


@case(2)
class _StopGradient(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Dense(D)(jax.lax.stop_gradient(jnp.tanh(nn.Dense(D)(x))))
    return y * x


@case(3)
class _SharedInputBehindStopGradient(nn.Module):
  """No gradient enters the first of three layers with one input."""

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(x)
    first = jax.lax.stop_gradient(nn.Dense(D)(x))
    return first * nn.Dense(D)(x) + nn.Dense(D)(x)


@case(2)
class _SharedInputInsideAScan(nn.Module):
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
class _SameInputTwoAxes(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = jnp.concatenate([x, x[:, :2]], axis=1)  # square
    return nn.DenseGeneral(D)(x) * nn.DenseGeneral(D, axis=-2)(x)


@case(2)
class _PassedToTwoParents(nn.Module):
  @nn.compact
  def __call__(self, x):
    class Parent(nn.Module):
      layer: nn.Module

      @nn.compact
      def __call__(self, x):
        return jnp.tanh(self.layer(x))

    shared = nn.Dense(D)
    return Parent(shared)(x) + Parent(shared)(2 * x)


@case(1)
class _CustomGradientAfterwards(nn.Module):
  @nn.compact
  def __call__(self, x):
    return _times_three_backwards(nn.Dense(D)(x))


@jax.custom_vjp
def _times_three_backwards(y):
  return y


_times_three_backwards.defvjp(lambda y: (y, None), lambda _, g: (3 * g,))


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
  losses, params, batch = of_model(_StopGradient)

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
  losses, params, batch = of_model(_NnJit)
  return jax.jit(losses), params, batch


@case(1)
def checkpointed_loss():
  losses, params, batch = of_model(_Scan)
  return jax.checkpoint(losses), params, batch


# --- Weights used in other ways: no tap may stand for them. ------------------


@case(0)
class _RawUse(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(D)
    return dense(x) @ dense.variables["params"]["kernel"]


@case(0)
class _BroadcastScan(nn.Module):
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
class _ScanOverAxisOne(nn.Module):
  @nn.compact
  def __call__(self, x):
    return scanned(Step, D, axis=1)()(x, None)[0]


@case(0)
class _VmapWithBroadcastParams(nn.Module):
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
class _VmapWithParams(nn.Module):
  @nn.compact
  def __call__(self, x):
    return _vmapped_dense(0, T, 1)(x) + _vmapped_dense(0, 2, None)(x).sum(0)


@case(0)
class _VmapWithParamsOverAxisOne(nn.Module):
  """All axes have one length, so that shapes tell nothing."""

  @nn.compact
  def __call__(self, x):
    x = jnp.concatenate([x, x[:, :2]], axis=1)  # [1, D, D]
    return _vmapped_dense(1, D, 0)(jnp.transpose(x, (1, 2, 0))[..., None] * x)


@case(0)
class _WeightNorm(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.WeightNorm(nn.Dense(D))(x)


@case(0)
class _Cond(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.cond(
      jnp.sum(x) > 0, lambda m, x: m(x), lambda m, x: -m(x), nn.Dense(D), x
    )


@case(0)
class _OwnPromotion(nn.Module):
  """promote_dtype may do anything to the weight."""

  @nn.compact
  def __call__(self, x):
    def promote(*args, dtype=None, **kwargs):
      del dtype, kwargs
      return [None if a is None else 3 * a for a in args]

    return nn.Dense(D, promote_dtype=promote)(x)


@case(0)
class _OwnDotGeneral(nn.Module):
  @nn.compact
  def __call__(self, x):
    def twice(*args, **kwargs):
      return 2 * jax.lax.dot_general(*args, **kwargs)

    return nn.Dense(D, dot_general=twice)(x)


@case(0)
class _Subclass(nn.Module):
  @nn.compact
  def __call__(self, x):
    class Doubled(nn.Dense):
      @nn.compact
      def __call__(self, x):
        return 2 * super().__call__(3 * x)

    return Doubled(D)(x)


@case(0)
class _KeywordArguments(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(D)(inputs=x)


@case(0)
class _OneCallWithAKeyword(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(D)
    return dense(jnp.tanh(dense(inputs=x)))


@case(0)
class _InterceptedInside(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(D)

    def outer(next_fun, args, kwargs, context):
      y = next_fun(*args, **kwargs)
      return 2 * y if isinstance(context.module, nn.Dense) else y

    # It stands between the tap and the layer.
    with nn.intercept_methods(outer):
      return dense(x)


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
  losses, params, x = of_model(_Scan)

  def of_product(params, batch, keys):
    loss, change = jax.jvp(
      lambda x: losses(params, x, keys)[0], (batch,), (jnp.ones_like(batch),)
    )
    return loss + change**2, {}

  return of_product, params, x


@case(0)
def adversarial_perturbation():
  losses, params, x = of_model(_SharedTwice)

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
  losses, params, x = of_model(_NnJit)

  def of_steered(params, batch, keys):
    return losses(jax.tree.map(_times_three_backwards, params), batch, keys)

  return of_steered, params, x


@case(0)
def scaled_parameters():
  losses, params, x = of_model(_SharedTwice)
  return (
    lambda p, b, k: losses(jax.tree.map(lambda w: 2 * w, p), b, k),
    params,
    x,
  )


@case(0)
def weight_decay_in_the_loss():
  losses, params, x = of_model(_SharedTwice)

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
  losses, params, x = of_model(_NnJit)

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
  losses, params, x = of_model(_StopGradient)

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
  losses, params, x = of_model(_StopGradient)

  def tied(params, batch, keys):
    found, aux = losses(params, batch, keys)
    return found + jnp.sum(params["Dense_1"]["kernel"] ** 2), aux

  return tied, params, x


@case(0)
def one_step_of_inner_training():
  """The loss after a gradient step, differentiated through the step."""
  losses, params, x = of_model(_SharedTwice)

  def after(params, batch, keys):
    def inner(params):
      return jnp.sum(losses(params, batch, keys)[0])

    slope = jax.grad(inner)(params)
    size = sum(jnp.sum(g**2) for g in jax.tree.leaves(slope))
    return losses(params, batch, keys)[0] * size, {}

  return after, params, x


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
