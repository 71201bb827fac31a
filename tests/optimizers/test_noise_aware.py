"""Second moments less what privacy noise adds to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import adagrad
from dptrain.optimizers import adamw
from dptrain.optimizers import rmsprop
from dptrain.optimizers import second_moments
from dptrain.optimizers import sm3

AWARE = {
  "adamw": adamw.adamw,
  "adagrad": adagrad.adagrad,
  "rmsprop": rmsprop.rmsprop,
  "sm3": sm3.sm3,
}
# Noise that changes by phase, as under a schedule of batch sizes.
STDDEVS = [1.0, 1.0, 0.5, 0.5, 0.25, 3.0]


def tree(seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    "kernel": jnp.asarray(scale * rng.normal(size=(4, 3)), jnp.float32),
    "bias": jnp.asarray(scale * rng.normal(size=3), jnp.float32),
    "temperature": jnp.asarray(scale * rng.normal(), jnp.float32),
  }


def run(optimizer, gradients, **extra):
  params = tree()
  state = optimizer.init(params)
  update = jax.jit(optax.with_extra_args_support(optimizer).update)
  for gradient in gradients:
    updates, state = update(gradient, state, params, **extra)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize(
  ("b1", "b2", "debias"),
  [(0.9, 0.95, True), (0.0, 0.9, False), (0.0, 1.0, False), (0.0, 0.0, True)],
)
def test_corrected_moments_are_unbiased_before_the_floor(b1, b2, debias):
  """Monte Carlo over 100,000 coordinates of one signal."""
  rng = np.random.default_rng(0)
  size = 100_000
  optimizer = second_moments.scale_by_second_moment(
    b1, b2, 1e-12, debias, correct_noise=True
  )
  state = optimizer.init(jnp.zeros(size))
  signal = noise = mean = 0.0
  for t, s in enumerate(STDDEVS, 1):
    g = 0.3 * t
    h = jnp.asarray(g + s * rng.normal(size=size), jnp.float32)
    updates, state = optimizer.update(h, state, noise_variance=s * s)
    keep, take = (1.0, 1.0) if b2 == 1.0 else (b2, 1 - b2)
    signal = keep * signal + take * g * g
    noise = keep * noise + take * s * s
    mean = b1 * mean + (1 - b1) * np.asarray(h)
    np.testing.assert_allclose(state.noise_variance, noise, rtol=1e-5)
    left = np.asarray(state.nu, np.float64) - noise
    assert abs(left.mean() - signal) < 5 * left.std() / np.sqrt(size)
    # It is not the noise that vanishes: uncorrected, the bias is seen.
    assert state.nu.mean() - signal > 10 * left.std() / np.sqrt(size)
    weight = 1 - b2**t if debias else 1.0
    root = np.sqrt(np.maximum(left, 0.1 * noise) / weight)
    top = mean / (1 - b1**t) if debias and b1 else mean
    np.testing.assert_allclose(updates, top / root, rtol=5e-3, atol=1e-4)


def test_the_noise_is_averaged_as_the_squares_are():
  """A constant in place of phi would be wrong as soon as the batch grows."""
  b2 = 0.9
  optimizer = second_moments.scale_by_second_moment(
    b2=b2, correct_noise=True, noise_floor=1e-6
  )
  size = 200_000
  state = optimizer.init(jnp.zeros(size))
  key = jax.random.key(0)
  for t, s in enumerate([1.0] * 10 + [0.1] * 3):
    h = s * jax.random.normal(jax.random.fold_in(key, t), (size,))
    _, state = optimizer.update(h, state, noise_variance=s * s)
  debiased = 1 - b2**13
  v = float(jnp.mean(state.nu)) / debiased
  phi = float(state.noise_variance) / debiased
  assert v == pytest.approx(phi, rel=0.01)
  assert phi > 20 * 0.1**2


@pytest.mark.parametrize("name", AWARE)
def test_without_noise_the_correction_changes_nothing(name):
  gradients = [tree(seed) for seed in range(1, 6)]
  plain = run(AWARE[name](0.1), gradients)
  aware = run(AWARE[name](0.1, correct_noise=True), gradients, noise_variance=0)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(aware), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", AWARE)
def test_noise_alone_is_divided_by_the_floor_at_least(name):
  """No step is longer than the floor allows."""
  optimizer = AWARE[name](1.0, weight_decay=0.0, correct_noise=True)
  params = tree()
  gradients = tree(1, scale=1e-6)
  s = 1e-6
  updates, _ = optimizer.update(
    gradients, optimizer.init(params), params, noise_variance=s * s
  )
  for u, g in zip(
    jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True
  ):
    # RMSProp's first average has weight 1 - b2 only.
    early = 10.0 if name == "rmsprop" else 1.0
    most = early * np.abs(g) / (np.sqrt(0.1) * s)
    assert (np.abs(u) <= most * 1.001).all()
    assert np.isfinite(u).all()


def test_adamw_is_the_paper_under_constant_noise():
  """DP-AdamBC in numpy: arXiv 2312.14334, with its phi and gamma'."""
  rng = np.random.default_rng(0)
  start = rng.normal(size=(3, 2))
  lr, b1, b2, decay, s, floor = 0.05, 0.8, 0.9, 0.7, 0.5, 0.2
  gradients = rng.normal(size=(6, 3, 2)) * np.array([0.1, 3.0])
  phi = s * s
  w, m, v = start.copy(), 0.0, 0.0
  for t, g in enumerate(gradients, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    hat = np.maximum(v / (1 - b2**t) - phi, floor * phi)
    w = w - lr * (m / (1 - b1**t) / np.sqrt(hat) + decay * w)
  optimizer = adamw.adamw(
    lr, b1, b2, 1e-12, decay, correct_noise=True, noise_floor=floor
  )
  params = {"kernel": jnp.asarray(start, jnp.float32)}
  state = optimizer.init(params)
  for g in gradients:
    updates, state = optimizer.update(
      {"kernel": jnp.asarray(g, jnp.float32)}, state, params, noise_variance=phi
    )
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["kernel"], w, rtol=1e-4)


@pytest.mark.parametrize("name", AWARE)
def test_a_missing_variance_is_named_when_tracing(name):
  optimizer = AWARE[name](0.1, correct_noise=True)
  params = tree()
  state = optimizer.init(params)
  with pytest.raises(ValueError, match="given no noise_variance"):
    jax.eval_shape(optimizer.update, params, state, params)
  with pytest.raises(ValueError, match=r"shape \(2,\) must be one number"):
    optimizer.update(params, state, params, noise_variance=jnp.ones(2))


@pytest.mark.parametrize("name", AWARE)
def test_uncorrected_optimizers_take_the_variance_and_ignore_it(name):
  gradients = [tree(seed) for seed in range(1, 4)]
  plain = run(AWARE[name](0.1), gradients)
  told = run(AWARE[name](0.1), gradients, noise_variance=7.0)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(told), strict=True):
    np.testing.assert_array_equal(a, b)


def test_uncorrected_moments_are_those_of_optax():
  gradients = [tree(seed) for seed in range(1, 6)]
  pairs = [
    (
      second_moments.scale_by_second_moment(0.9, 0.99, 1e-6),
      optax.scale_by_adam(0.9, 0.99, 1e-6),
    ),
    (
      second_moments.scale_by_second_moment(b2=0.9, eps=1e-7, debias=False),
      optax.scale_by_rms(0.9, 1e-7, eps_in_sqrt=False),
    ),
    (
      second_moments.scale_by_second_moment(b2=1.0, eps=1e-30, debias=False),
      optax.scale_by_rss(0.0, 1e-30),
    ),
  ]
  for ours, theirs in pairs:
    a, b = run(ours, gradients), run(theirs, gradients)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_variances_of_mega_batches_are_not_lost():
  """A clip norm of 3e-3, noise 0.5, two million examples: s^2 = 5.6e-19."""
  s = 0.5 * 3e-3 / 2e6
  optimizer = second_moments.scale_by_second_moment(
    b2=0.9, eps=1e-15, correct_noise=True
  )
  state = optimizer.init(jnp.zeros(1000))
  key = jax.random.key(1)
  for t in range(50):
    h = s * jax.random.normal(jax.random.fold_in(key, t), (1000,))
    updates, state = optimizer.update(h, state, noise_variance=s * s)
  weight = 1 - 0.9**50
  assert float(state.noise_variance) == pytest.approx(s * s * weight, rel=1e-4)
  assert np.isfinite(updates).all()
  assert np.std(updates) > 0.5


@pytest.mark.parametrize(
  ("factory", "bad", "message"),
  [
    (adamw.adamw, {"noise_floor": 0.0}, "noise_floor=0.0"),
    (adagrad.adagrad, {"eps": 0.0}, "eps=0.0"),
    (adagrad.adagrad, {"noise_floor": -1.0}, "noise_floor=-1.0"),
    (adagrad.adagrad, {"weight_decay": -1.0}, "weight_decay=-1.0"),
    (rmsprop.rmsprop, {"b2": 1.0}, "b2=1.0"),
    (rmsprop.rmsprop, {"momentum": 1.0}, "momentum=1.0"),
    (rmsprop.rmsprop, {"learning_rate": 0.0}, "learning_rate=0.0"),
  ],
)
def test_noise_aware_optimizers_refuse_bad_settings(factory, bad, message):
  with pytest.raises(ValueError, match=message):
    factory(**{"learning_rate": 0.1, **bad})
