"""SM3 against its paper, written out in numpy, and against Optax's."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.optimizers import layers
from dptrain.optimizers import sm3

SHAPES = [(), (5,), (4, 3), (2, 3, 4), (2, 2, 3, 2)]


def reference(gradients, variant, b1, b2):
  """Updates of every step, in float64, coordinate by coordinate."""
  shape = gradients[0].shape
  axes = range(len(shape))
  slices = [(axis, n) for axis in axes for n in range(shape[axis])]
  mu = dict.fromkeys(slices or [()], 0.0)
  momentum, out = np.zeros(shape), []

  def covering(i):
    return [(axis, i[axis]) for axis in axes] or [()]

  def mixed(old, new):
    return old + new if b2 == 1.0 else b2 * old + (1 - b2) * new

  for t, g in enumerate(gradients, 1):
    nu = np.zeros(shape)
    indices = list(np.ndindex(shape))
    if variant == "I":
      for r in mu:
        mu[r] = mixed(
          mu[r], max(g[i] ** 2 for i in indices if r in covering(i))
        )
      for i in indices:
        nu[i] = min(mu[r] for r in covering(i))
    else:
      for i in indices:
        nu[i] = mixed(min(mu[r] for r in covering(i)), g[i] ** 2)
      for r in mu:
        mu[r] = max(nu[i] for i in indices if r in covering(i))
    hat = nu if b2 == 1.0 else nu / (1 - b2**t)
    step = np.divide(g, np.sqrt(hat), out=np.zeros(shape), where=hat > 0)
    momentum = b1 * momentum + (1 - b1) * step
    out.append(momentum)
  return out


def run(optimizer, gradients):
  state = optimizer.init(jax.tree.map(jnp.zeros_like, gradients[0]))
  update = jax.jit(optimizer.update)
  out = []
  for g in gradients:
    updates, state = update(g, state)
    out.append(updates)
  return out, state


def second_moments(optimizer, gradients):
  """Nu of every step, read off unaveraged steps: (g / step) ** 2."""
  steps, _ = run(optimizer, gradients)
  return [
    np.square(g / np.asarray(s)) for g, s in zip(gradients, steps, strict=True)
  ]


@pytest.mark.parametrize("variant", sm3.VARIANTS)
@pytest.mark.parametrize("b2", [1.0, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_paper_in_numpy(variant, b2, shape):
  rng = np.random.default_rng(0)
  gradients = rng.normal(size=(6, *shape)) * 1e-6  # of a mega-batch's size
  gradients[:, ...] *= rng.random(shape) < 0.8  # some coordinates stay at 0
  expected = reference(list(gradients), variant, 0.7, b2)
  optimizer = sm3.scale_by_sm3(0.7, b2, variant)
  got, _ = run(optimizer, [jnp.asarray(g, jnp.float32) for g in gradients])
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  shape=st.sampled_from([(3,), (3, 4), (2, 3, 2)]),
  spread=st.floats(0.0, 3.0),
)
def test_ii_bounds_the_sum_of_squares_more_tightly_than_i(seed, shape, spread):
  rng = np.random.default_rng(seed)
  gradients = rng.normal(size=(5, *shape)) * np.exp(
    spread * rng.normal(size=shape)
  )
  gradients = list(gradients.astype(np.float32))
  one = second_moments(sm3.scale_by_sm3(0.0, variant="I"), gradients)
  two = second_moments(sm3.scale_by_sm3(0.0, variant="II"), gradients)
  sums = np.cumsum(np.square(gradients), axis=0)
  assert (np.array(two) >= sums * (1 - 1e-4)).all()
  assert (np.array(two) <= np.array(one) * (1 + 1e-4)).all()
  if len(shape) == 1:  # a cover of single coordinates is AdaGrad
    np.testing.assert_allclose(two, sums, rtol=1e-4)


def test_ii_is_tighter_somewhere():
  gradients = [np.float32([[2, 1], [1, 1]]), np.float32([[1, 1], [1, 2]])]
  one = second_moments(sm3.scale_by_sm3(0.0, variant="I"), gradients)
  two = second_moments(sm3.scale_by_sm3(0.0, variant="II"), gradients)
  assert (one[1] - two[1]).max() > 0.5


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_agrees_with_optax_where_that_has_no_epsilon(shape):
  rng = np.random.default_rng(1)
  gradients = [
    jnp.asarray(g, jnp.float32) for g in rng.normal(size=(5, *shape))
  ]
  theirs, _ = run(optax.scale_by_sm3(0.9, 1.0, eps=0.0), gradients)
  ours, _ = run(sm3.scale_by_sm3(0.9, 1.0), gradients)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_where_optax_goes_wrong():
  with pytest.raises(IndexError):
    run(optax.scale_by_sm3(), [jnp.float32(1.0)])
  tiny = [jnp.float32([[1e-7, 1e-5]])]
  (theirs,), _ = run(optax.scale_by_sm3(0.0), tiny)
  (ours,), _ = run(sm3.scale_by_sm3(0.0), tiny)
  assert float(theirs[0, 0]) < 0.01  # no adaptation is left
  np.testing.assert_allclose(ours, 1.0, rtol=1e-5)


def bert_base(scan):
  model = masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=30522,
      num_layers=12,
      width=768,
      num_heads=12,
      max_length=512,
      scan_layers=scan,
    )
  )
  return jax.eval_shape(model.init, jax.random.key(0, impl="threefry2x32"))


@pytest.mark.parametrize("scan", [False, True])
def test_second_moments_of_bert_base_take_under_two_percent_of_adams(scan):
  params = bert_base(scan)
  state = jax.eval_shape(sm3.scale_by_sm3(b1=0.0).init, params)
  adam = layers.memory(jax.eval_shape(optax.scale_by_adam().init, params).nu)
  assert adam > 100e6
  assert 0 < layers.memory(state.accumulators) < 0.02 * adam
  assert layers.memory(state) - layers.memory(state.accumulators) == 2
  with_momentum = jax.eval_shape(sm3.scale_by_sm3(b1=0.9).init, params)
  assert layers.memory(with_momentum.momentum) == adam


def test_memory_is_the_sum_of_the_dimensions():
  params = {"a": jnp.zeros((7, 5, 3)), "b": jnp.zeros(()), "c": jnp.zeros(4)}
  state = sm3.scale_by_sm3(b1=0.0).init(params)
  assert layers.memory(state.accumulators) == 7 + 5 + 3 + 1 + 4


def test_stacked_layers_get_what_they_get_alone():
  rng = np.random.default_rng(2)
  gradients = rng.normal(size=(4, 3, 5, 2)).astype(np.float32)
  gradients *= np.float32([1, 10, 100])[:, None, None]
  stacked, _ = run(
    sm3.scale_by_sm3(),
    [{"layers": {"kernel": jnp.asarray(g)}} for g in gradients],
  )
  alone, _ = run(
    sm3.scale_by_sm3(),
    [{f"layers_{n}": jnp.asarray(g[n]) for n in range(3)} for g in gradients],
  )
  for a, b in zip(stacked, alone, strict=True):
    one = jnp.stack([b[f"layers_{n}"] for n in range(3)])
    np.testing.assert_allclose(a["layers"]["kernel"], one, rtol=1e-6)
  across, _ = run(
    sm3.scale_by_sm3(stacked=None),
    [{"layers": {"kernel": jnp.asarray(g)}} for g in gradients],
  )
  kernels = [s[-1]["layers"]["kernel"] for s in (across, stacked)]
  assert not np.allclose(*kernels)


def test_bfloat16_parameters_keep_float32_moments():
  gradients = [jnp.full((2, 3), 1e-3, jnp.bfloat16)] * 3
  (*_, last), state = run(sm3.scale_by_sm3(), gradients)
  assert last.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state.accumulators)} == {
    jnp.dtype("float32")
  }


@pytest.mark.parametrize("variant", sm3.VARIANTS)
@pytest.mark.parametrize("b2", [1.0, 0.9])
def test_corrected_vectors_are_unbiased_and_matrices_bounded(variant, b2):
  rng = np.random.default_rng(3)
  size, stddevs = 40_000, [1.0, 0.5, 3.0, 0.2]
  g = 0.3
  state = {"v": jnp.zeros(size), "m": jnp.zeros((200, 200))}
  optimizer = sm3.scale_by_sm3(0.0, b2, variant, correct_noise=True)
  noisy = optimizer.init(state)
  signal = noise = 0.0
  for t, s in enumerate(stddevs, 1):
    h = jnp.asarray(g + s * rng.normal(size=size), jnp.float32)
    gradient = {"v": h, "m": h.reshape(200, 200)}
    updates, noisy = optimizer.update(
      gradient, noisy, noise_variance=jnp.float32(s * s)
    )
    weight = 1.0 if b2 == 1.0 else 1 - b2
    keep = b2 if b2 < 1 else 1.0
    signal = keep * signal + weight * g * g
    noise = keep * noise + weight * s * s
    np.testing.assert_allclose(noisy.noise_variance, noise, rtol=1e-5)
    (nu,) = noisy.accumulators["v"]
    spread = np.std(nu) / np.sqrt(size)
    left = float(jnp.mean(nu) - noisy.noise_variance)
    assert abs(left - signal) < 5 * spread + 1e-5
    rows, columns = noisy.accumulators["m"]
    least = jnp.minimum(rows[:, None], columns[None, :])
    bound = float(jnp.mean(least) - noisy.noise_variance)
    assert bound > signal  # an upper bound, and not a tight one
    # What divides: the corrected second moment, above its floor.
    total = 1.0 if b2 == 1.0 else 1 - b2**t
    root = np.sqrt(np.maximum(nu - noise, 0.1 * noise) / total)
    np.testing.assert_allclose(updates["v"], h / root, rtol=2e-3)


def test_subtracting_once_is_subtracting_each_time():
  """Min and max commute with adding one number to all slices."""
  rng = np.random.default_rng(4)
  squares = rng.normal(size=(5, 4, 3)) ** 2
  variances = rng.random(5)
  for variant in sm3.VARIANTS:
    plain = (np.zeros(4), np.zeros(3))
    each = plain
    for x, variance in zip(squares, variances, strict=True):
      nu, plain = sm3._advanced(jnp.asarray(x), plain, 0, 1.0, variant)
      less, each = sm3._advanced(
        jnp.asarray(x - variance), each, 0, 1.0, variant
      )
    np.testing.assert_allclose(nu - variances.sum(), less, atol=1e-5)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ({"b1": 1.0}, "b1=1.0"),
    ({"b2": 1.1}, "b2=1.1"),
    ({"variant": "III"}, "variant='III'"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ({"noise_floor": 0.0}, "noise_floor=0.0"),
  ],
)
def test_sm3_refuses_bad_settings_by_name(bad, message):
  with pytest.raises(ValueError, match=message):
    sm3.sm3(**{"learning_rate": 0.1, **bad})
