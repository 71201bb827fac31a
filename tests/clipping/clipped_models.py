"""What cases of models and losses are made of, and how methods are compared.

The cases themselves are in the rooms that `clipping_cases` names.
"""

import functools

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
    name = built.__name__.lower()
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
  return errors_of(run, params, batch), uses


def errors_of(run, params, batch):
  """As `errors`, of what `clipped` has made."""
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
  return result


def relative(found, truth):
  found, truth = np.asarray(found, float), np.asarray(truth, float)
  return float(np.max(np.abs(found - truth) / np.max(np.abs(truth))))


def norm_of(gradients):
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
  return np.sqrt(sum(np.sum(np.square(x)) for x in leaves))


def check_each_contribution(run, params, batch, rule, reached=1):
  """Each example alone moves the sum by its bound, not more.

  `run` is what `clipped` made with that rule.
  """
  for which in range(B):
    for method, found in run(params, batch, np.arange(B) != which).items():
      size = norm_of(found.gradients)
      assert size <= rule.sensitivity * (1 + 1e-6), method
      assert size >= reached * 0.99 * rule.sensitivity, method
