"""Scales and gains that learn from the agreement of successive gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import adamw
from dptrain.optimizers import layers
from dptrain.optimizers import step_size_adaptation

adapt = step_size_adaptation.adapt_step_size


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    "layers": {"kernel": jnp.asarray(scale * rng.normal(size=(2, 3)))},
    "bias": jnp.asarray(scale * rng.normal(size=4)),
    "temperature": jnp.asarray(scale * rng.normal()),
  }


def descend(optimizer, start, steps, curvature=1.0):
  """Minimises curvature / 2 * |x|^2."""

  def step(carry, _):
    x, state = carry
    updates, state = optimizer.update(curvature * x, state, x)
    return (optax.apply_updates(x, updates), state), None

  carry = start, optimizer.init(start)
  return jax.lax.scan(step, carry, length=steps)[0]


def test_is_its_formula_in_numpy():
  scale_rate, gain_rate, decay, lr = 0.3, 0.5, 0.6, 0.1
  optimizer = adapt(optax.sgd(lr), scale_rate, gain_rate, decay)
  state = optimizer.init(tree(0))
  # Layer by layer: what an rms is taken over.
  average, gains, s = [np.zeros(n) for n in (3, 3, 4, 1)], None, 1.0
  gains = [np.ones_like(a) for a in average]

  def parts(t):
    kernel = np.asarray(t["layers"]["kernel"], np.float64)
    rest = [np.atleast_1d(np.asarray(t[k])) for k in ("bias", "temperature")]
    return [*kernel, *rest]

  for seed in range(1, 6):
    gradient = tree(seed)
    updates, state = optimizer.update(gradient, state)
    g = parts(gradient)
    flat_a, flat_g = np.concatenate(average), np.concatenate(g)
    if np.any(flat_a):
      cosine = flat_a @ flat_g / np.linalg.norm(flat_a) / np.linalg.norm(flat_g)
      s = np.clip(s * np.exp(scale_rate * cosine), 0.01, 100.0)
      for p, a, x in zip(gains, average, g, strict=True):
        rms = np.sqrt(np.mean(a**2) * np.mean(x**2))
        p *= np.exp(gain_rate * np.clip(a * x / rms, -1, 1))
        np.clip(p, 0.1, 10.0, out=p)
    for got, p, x in zip(parts(updates), gains, g, strict=True):
      np.testing.assert_allclose(got, -lr * s * p * x, rtol=1e-4, atol=1e-7)
    average = [
      decay * a + (1 - decay) * x for a, x in zip(average, g, strict=True)
    ]
  assert float(state.scale) == pytest.approx(s, rel=1e-5)


@pytest.mark.parametrize("gain_rate", [0.0, 0.05])
def test_steps_too_short_grow(gain_rate):
  start = jnp.linspace(1.0, 2.0, 5)
  plain, _ = descend(optax.sgd(1e-3), start, 200)
  adapted, state = descend(adapt(optax.sgd(1e-3), 0.05, gain_rate), start, 200)
  assert np.linalg.norm(adapted) < 0.05 * np.linalg.norm(plain)
  assert float(state.scale) > 4


def test_steps_too_long_shrink():
  start = jnp.ones(3)
  plain, _ = descend(optax.sgd(2.1), start, 60)
  adapted, state = descend(adapt(optax.sgd(2.1), 0.05), start, 60)
  assert np.linalg.norm(plain) > 100
  assert np.linalg.norm(adapted) < 1e-2
  assert float(state.scale) < 0.95


def test_gains_differ_by_coordinate():
  """One coordinate too slow, one too fast, under one learning rate."""
  curvature = jnp.array([0.01, 2.1])
  optimizer = adapt(optax.sgd(1.0), 0.0, 0.1)
  _, state = descend(optimizer, jnp.ones(2), 10, curvature)
  assert float(state.gains[0]) >= 1.0 > float(state.gains[1])


def test_noise_alone_barely_moves_the_scale():
  optimizer = adapt(optax.sgd(1.0), 0.01)
  state = optimizer.init(jnp.zeros(10_000))
  key = jax.random.key(0)
  for t in range(50):
    noise = jax.random.normal(jax.random.fold_in(key, t), (10_000,))
    _, state = optimizer.update(noise, state)
  assert float(state.scale) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_the_size_of_gradients_does_not_count(scale):
  optimizer = adapt(optax.sign_sgd(1.0), 0.1, 0.1)
  states = []
  for by in (1.0, scale):
    state = optimizer.init(tree(0))
    for seed in range(1, 5):
      _, state = optimizer.update(tree(seed, by), state)
    states.append((state.scale, state.gains))
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_limits_hold_and_zero_rates_change_nothing():
  start = jnp.ones(2)
  optimizer = adapt(optax.sgd(1e-4), 1.0, 1.0, 0.9, (0.5, 3.0), (0.5, 2.0))
  _, state = descend(optimizer, start, 30)
  assert float(state.scale) == 3.0
  np.testing.assert_array_equal(state.gains, 2.0)
  still, _ = descend(adapt(optax.sgd(0.1), 0.0), start, 5)
  np.testing.assert_array_equal(still, descend(optax.sgd(0.1), start, 5)[0])


def test_extra_arguments_reach_the_optimizer_within():
  optimizer = adapt(adamw.adamw(0.1, correct_noise=True))
  params = tree(0)
  state = optimizer.init(params)
  optimizer.update(params, state, params, noise_variance=0.1)
  with pytest.raises(ValueError, match="noise_variance"):
    optimizer.update(params, state, params)


def test_memory_is_one_average_and_gains_only_if_asked_for():
  params = tree(0)
  size = layers.memory(params)
  for rate, copies in ((0.0, 1), (0.1, 2)):
    state = adapt(optax.identity(), gain_rate=rate).init(params)
    assert layers.memory(state) == copies * size + 1


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"scale_rate": -1.0}, "scale_rate=-1.0"),
    ({"gain_rate": float("inf")}, "gain_rate=inf"),
    ({"decay": 1.0}, "decay=1.0"),
    ({"scale_limits": (0.0, 2.0)}, "scale_limits="),
    ({"gain_limits": (2.0, 3.0)}, "gain_limits="),
  ],
)
def test_step_size_adaptation_refuses_bad_settings(bad, message):
  with pytest.raises(ValueError, match=message):
    adapt(optax.sgd(0.1), **bad)
