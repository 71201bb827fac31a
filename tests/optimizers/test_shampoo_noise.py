"""What the variance of the noise does to Shampoo's factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import preconditioner_statistics
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform

VARIANCE = 0.25
SHAPES = {
  "one_block": ((6, 4), {}),
  "padded_blocks": ((7, 5), {"block_size": 4}),
  "merged": ((5, 2, 3), {"merge_up_to": 8}),
  "rank_3": ((3, 4, 2), {"merge_up_to": 1}),
  "rank_3_padded": ((3, 4, 5), {"merge_up_to": 1, "block_size": 2}),
  "one_sided": ((6, 4), {"sides": "input"}),
  "long_dim": ((9, 3), {"max_dim": 6}),
  "vector": ((5,), {"min_rank": 1}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_noise_adds_the_stated_multiple_of_the_identity(case):
  """In the mean over many draws, beside a gradient that stays."""
  shape, blocking = SHAPES[case]
  rng = np.random.default_rng(0)
  clean = rng.normal(size=shape)
  plans = shampoo_blocks.plan({"w": clean}, shampoo_blocks.Blocking(**blocking))
  layout = preconditioner_statistics.stacks(plans)

  def products(g):
    blocks = [plans[0].blocked(g)]
    return preconditioner_statistics.products(layout, blocks, jnp.float32)

  draws = 20_000
  noise = np.sqrt(VARIANCE) * rng.normal(size=(draws, *shape))
  # Not averaged under jit: jaxlib 0.10.1 crashes on so many rows at once.
  drawn = jax.jit(jax.vmap(products))(jnp.asarray(clean + noise, jnp.float32))
  total = {key: np.mean(x, axis=0) for key, x in drawn.items()}
  without = products(jnp.asarray(clean, jnp.float32))
  multiples = preconditioner_statistics.noise_multiples(layout, plans)
  sizes = preconditioner_statistics.true_sizes(layout, plans)
  for key, found in total.items():
    for i, gained in enumerate(np.asarray(found - without[key])):
      true = np.arange(gained.shape[0]) < sizes[key][i]
      expected = VARIANCE * multiples[key][i] * np.diag(true.astype(float))
      # Five standard errors of the largest entry's mean.
      spread = 5 * np.abs(np.diag(found[i])).max() * np.sqrt(2 / draws)
      np.testing.assert_allclose(gained, expected, atol=spread)
      assert multiples[key][i] * VARIANCE > spread, "a test of nothing"


def settings(**changes):
  refresh = preconditioner_refresh.RefreshSettings(start=1, interval=1)
  return shampoo_settings.ShampooSettings(
    **{
      "refresh": refresh,
      "momentum": 0.0,
      "graft": None,
      "subtract_noise": True,
      "roots": inverse_roots.RootSettings("eigh", ridge=1e-3),
      **changes,
    }
  )


def directions(grads, variances, **changes):
  optimizer = shampoo_transform.scale_by_shampoo(settings(**changes))
  state = optimizer.init({"w": grads[0]})
  update = jax.jit(optimizer.update)
  for g, variance in zip(grads, variances, strict=True):
    found, state = update({"w": g}, state, noise_variance=variance)
  return np.asarray(found["w"]), state


def numpy_direction(grads, variances, beta2):
  factors, noise, weight = [0.0, 0.0], 0.0, 1 - beta2 if beta2 < 1 else 1.0
  for g, variance in zip(grads, variances, strict=True):
    factors = [
      beta2 * factors[0] + weight * g @ g.T,
      beta2 * factors[1] + weight * g.T @ g,
    ]
    noise = beta2 * noise + weight * variance
  bias = 1 - beta2 ** len(grads) if beta2 < 1 else 1.0
  roots = []
  for factor, others in zip(factors, grads[0].shape[::-1], strict=True):
    values, vectors = np.linalg.eigh(factor / bias)
    values -= min(noise * others / bias, 0.95 * max(values[0], 0.0))
    values = np.maximum(values, 0) + 1e-3 * values[-1]
    roots.append((vectors * values**-0.25) @ vectors.T)
  return roots[0] @ grads[-1] @ roots[1]


@pytest.mark.parametrize("beta2", [0.9, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_variances_are_averaged_as_factors_are_and_clamped(beta2, scale):
  """At 100 times the variance, the smallest eigenvalue is what is taken."""
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(12, 5, 4))
  variances = scale * rng.uniform(0.1, 0.4, size=12)
  with jax.enable_x64(True):
    found, state = directions(
      list(jnp.asarray(grads)), list(variances), beta2=beta2
    )
  assert state.failed_roots == 0
  expected = numpy_direction(grads, variances, beta2)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_late_roots_subtract_the_noise_of_their_factors():
  rng = np.random.default_rng(0)
  grads = list(jnp.asarray(rng.normal(size=(9, 4, 4)), jnp.float32))
  variances = [0.2] * 8 + [5.0]
  late = preconditioner_refresh.RefreshSettings(start=8, interval=4, delay=1)
  found, _ = directions(grads, variances, refresh=late)
  roots_of_8, _ = directions(
    [*grads[:8], grads[8]], [*variances[:8], 0.2], refresh=late
  )
  np.testing.assert_array_equal(found, roots_of_8)


def test_with_noise_taken_off_directions_are_nearer_the_clean_ones():
  """Noise of 9 times the signal's variance, summed over 400 updates."""
  rng = np.random.default_rng(0)
  scales = np.logspace(0, -1.5, 12)
  clean = scales[:, None] * rng.normal(size=(400, 12, 12)) * scales
  variance = 9 * float(np.mean(clean**2))
  noisy = clean + np.sqrt(variance) * rng.normal(size=clean.shape)
  probe = 1e-9 * rng.normal(size=(1, 12, 12))

  def direction(grads, subtract, keep=0.05):
    grads = jnp.asarray(np.concatenate([grads, probe]), jnp.float32)
    roots = inverse_roots.RootSettings("eigh", keep=keep)
    once = preconditioner_refresh.RefreshSettings(start=400, interval=400)
    found, _ = directions(
      list(grads),
      [variance] * 401,
      beta2=1.0,
      subtract_noise=subtract,
      refresh=once,
      roots=roots,
    )
    return found / np.linalg.norm(found)

  wanted = direction(clean, False)
  plain = np.sum(wanted * direction(noisy, False))
  assert np.sum(wanted * direction(noisy, True)) > plain + 0.03
  # Where nothing is kept, the ridge alone decides.
  assert np.sum(wanted * direction(noisy, True, keep=0.0)) < plain


def test_a_loop_that_does_not_tell_the_noise_is_refused():
  optimizer = shampoo_transform.scale_by_shampoo(settings())
  state = optimizer.init({"w": jnp.zeros((2, 2))})
  with pytest.raises(ValueError, match="noise_variance"):
    optimizer.update({"w": jnp.zeros((2, 2))}, state)
