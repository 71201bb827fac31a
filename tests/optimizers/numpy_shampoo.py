"""Shampoo in float64 numpy, dense, in one block; and how tests run ours."""

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform

RIDGE = 1e-6


def refresh(**changes):
  return preconditioner_refresh.RefreshSettings(
    **{"start": 1, "interval": 1, **changes}
  )


def settings(**changes):
  return shampoo_settings.ShampooSettings(**{"refresh": refresh(), **changes})


def transform(**changes):
  return shampoo_transform.scale_by_shampoo(settings(**changes))


def gradients(shapes, steps, seed=0):
  """Correlated along every dimension, as gradients of layers are."""
  rng = np.random.default_rng(seed)
  result = []
  mixes = {
    name: [rng.normal(size=(d, d)) / np.sqrt(d) for d in shape]
    for name, shape in shapes.items()
  }
  for _ in range(steps):
    tree = {}
    for name, shape in shapes.items():
      g = rng.normal(size=shape)
      for axis, mix in enumerate(mixes[name]):
        g = np.moveaxis(np.tensordot(mix, g, (1, axis)), 0, axis)
      tree[name] = g
    result.append(tree)
  return result


def run(optimizer, grads, params=None, jit=True, **extra):
  """Updates [steps] and the last state."""
  if params is None:
    params = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, grads[0]))
  state = optimizer.init(params)
  update = jax.jit(optimizer.update) if jit else optimizer.update
  found = []
  for g in grads:
    updates, state = update(
      jax.tree.map(jnp.asarray, g), state, params, **extra
    )
    found.append(jax.device_get(updates))
  return found, state


# --- the reference: dense, in numpy -------------------------------------------


def inverse_root(a, p):
  values, vectors = np.linalg.eigh(a)
  values = np.maximum(values, 0) + RIDGE * values[-1]
  return (vectors * values ** (-1 / p)) @ vectors.T


class Magnitude:
  def __init__(self, name, b2, eps):
    self.name, self.b2, self.eps, self.v, self.t = name, b2, eps, 0.0, 0

  def __call__(self, g):
    self.t += 1
    if self.name.endswith("_normalized"):
      g = g / np.linalg.norm(g)
    kind = self.name.removesuffix("_normalized")
    if kind == "sgd":
      return g
    if kind == "sqrt_n":
      return np.sign(g)
    if kind == "adagrad":
      self.v = self.v + g * g
      return g / (np.sqrt(self.v) + self.eps)
    self.v = self.b2 * self.v + (1 - self.b2) * g * g
    v = self.v / (1 - self.b2**self.t) if kind == "adam" else self.v
    return g / (np.sqrt(v) + self.eps)


def shampoo(
  grads, beta2, momentum, moving_average, nesterov, graft, start, interval
):
  """Updates of one array of any rank."""
  factors = [np.zeros((d, d)) for d in grads[0].shape]
  roots = [np.eye(d) for d in grads[0].shape]
  magnitude = Magnitude(graft or "sgd", beta2 if beta2 < 1 else 0.999, 1e-8)
  m, result = 0.0, []
  for t, g in enumerate(grads, 1):
    for i in range(g.ndim):
      rows = np.moveaxis(g, i, 0).reshape(g.shape[i], -1)
      weight = 1 - beta2 if beta2 < 1 else 1
      factors[i] = beta2 * factors[i] + weight * rows @ rows.T
    if t >= start and (t - start) % interval == 0:
      bias = 1 - beta2**t if beta2 < 1 else 1
      roots = [inverse_root(f / bias, 2 * g.ndim) for f in factors]
    u = wanted = magnitude(g)
    if t >= start:
      u = g
      for i, root in enumerate(roots):
        u = np.moveaxis(np.tensordot(root, u, (1, i)), 0, i)
      if graft:
        u = u * np.linalg.norm(wanted) / np.linalg.norm(u)
    weight = 1 - momentum if moving_average else 1
    m = momentum * m + weight * u
    out = m
    if moving_average:
      out = m / (1 - momentum**t)
      if nesterov:
        out = momentum * m / (1 - momentum ** (t + 1)) + weight * u / (
          1 - momentum**t
        )
    elif nesterov:
      out = momentum * m + u
    result.append(out)
  return result
