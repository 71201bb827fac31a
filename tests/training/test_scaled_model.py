"""Scale-then-privatise through the real step, by every clipping method."""

import dataclasses

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import pytest
import small_run

from dptrain.clipping import methods
from dptrain.clipping import per_example
from dptrain.clipping import rules
from dptrain.models import masked_lm
from dptrain.models import scaled
from dptrain.optimizers import adamw
from dptrain.optimizers import layers
from dptrain.optimizers import scale_then_privatise
from dptrain.optimizers import sgd
from dptrain.training import loop
from dptrain.training import step as step_lib


class Tiny(nn.Module):
  """Layers that one pass would tap, were their weights untouched."""

  @nn.compact
  def __call__(self, inputs):
    embed = nn.Embed(small_run.VOCABULARY, 8)
    x = embed(inputs)
    x = nn.tanh(nn.Dense(8)(x + x.mean(1, keepdims=True)))
    return embed.attend(x)


@dataclasses.dataclass(frozen=True)
class TinyModel(masked_lm.MaskedLanguageModel):
  def init(self, key):
    return Tiny().init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  def logical_axes(self):
    return {
      "Dense_0": {"bias": ("mlp",), "kernel": ("embed", "mlp")},
      "Embed_0": {"embedding": ("vocab", "embed")},
    }

  def _logits(self, params, batch, keys):
    del keys
    logits = Tiny().apply({"params": params}, batch["inputs"])
    picked = batch["positions"][..., None]
    return jnp.take_along_axis(logits, picked, axis=1), {}


SCALED = scaled.ScaledModel(base=TinyModel(small_run.model().bert))
QUICK = scaled.ScaledModel(base=small_run.QuickModel(small_run.model().bert))


def key(number):
  return jax.random.key(number, impl="threefry2x32")


def batch(rows=6, length=8):
  tokens = jax.random.randint(key(3), (rows, length), 0, 20)
  return {
    "inputs": tokens,
    "positions": jnp.tile(jnp.arange(3), (rows, 1)),
    "labels": tokens[:, :3],
    "weights": jnp.ones((rows, 3)),
    "is_padding": jnp.arange(rows) == rows - 1,
    "example_ids": jnp.arange(rows),
  }


def losses(params, batch, keys):
  return SCALED.losses(params, batch, keys)


def params_with_divisors():
  params = SCALED.init(key(0))
  keys = iter(jax.random.split(key(1), 100))
  divisors = jax.tree.map(
    lambda d: jnp.exp(jax.random.normal(next(keys), d.shape)),
    params["divisors"],
  )
  return params | {"divisors": divisors}


def example_keys(rows=6):
  return jax.random.split(key(2), rows)


def clipped(params, rows, keys, norm):
  rule = rules.ClippingRule(l2_clip_norm=norm)
  return jax.jit(
    lambda params: per_example.clipped_sum(
      losses, params, rows, keys, rows["is_padding"], rule
    )
  )(params)


def close(a, b, rtol=2e-4):
  scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(b))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5 * scale)


def divided_by_hand(params, rule, rows):
  """Per-example gradients, divided, clipped and added up one at a time."""

  @jax.jit
  def gradient(one, key):
    def loss(model):
      return SCALED.base.losses(model, one, key)[0][0]

    return jax.grad(loss)(params["model"])

  total = jax.tree.map(np.zeros_like, params["model"])
  for row in range(5):  # the last one is padding
    one = jax.tree.map(lambda x, row=row: x[row : row + 1], rows)
    g = gradient(one, example_keys()[row : row + 1])
    g = jax.tree.map(lambda g, d: np.asarray(g / d), g, params["divisors"])
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
    factor = min(1.0, rule.l2_clip_norm / norm)
    total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, g)
  return total


@pytest.fixture(scope="module")
def by_hand():
  rule = rules.ClippingRule(l2_clip_norm=2.0)
  return divided_by_hand(params_with_divisors(), rule, batch())


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_clips_the_divided_gradient(method, by_hand):
  params, rows = params_with_divisors(), batch()
  rule = rules.ClippingRule(l2_clip_norm=2.0)
  found = jax.jit(
    lambda params: (
      methods.clipped_sum(
        losses,
        params,
        rows,
        example_keys(),
        rows["is_padding"],
        rule,
        method,
      ).gradients
    )
  )(params)
  close(found["model"], by_hand)
  for leaf in jax.tree.leaves(found["divisors"]):
    np.testing.assert_array_equal(leaf, 0.0)


def test_no_example_moves_the_sum_by_more_than_the_clip_norm():
  params, rows = params_with_divisors(), batch(1)
  rows["is_padding"] = jnp.zeros(1, bool)
  # Divisors far from 1: in the unscaled space the example is far longer.
  params["divisors"] = jax.tree.map(lambda d: d * 1e-4, params["divisors"])
  total = clipped(params, rows, example_keys(1), 0.5)
  assert float(total.norms[0]) > 100
  assert float(optax.tree.norm(total.gradients)) == pytest.approx(0.5, rel=1e-5)


def test_agrees_with_jax_privacy():
  params, rows = params_with_divisors(), batch()
  rows = jax.tree.map(lambda x: x[:5], rows)

  def loss(model, row):
    one = jax.tree.map(lambda x: x[None], row)
    return SCALED.base.losses(model, one)[0][0]

  theirs = jax.jit(
    jax_privacy.clipped_grad(
      loss,
      l2_clip_norm=2.0,
      keep_batch_dim=False,
      pre_clipping_transform=lambda g: jax.tree.map(
        jnp.divide, g, params["divisors"]
      ),
    )
  )(params["model"], rows)
  ours = clipped(params, rows, example_keys(5), 2.0)
  close(ours.gradients["model"], theirs)


def test_the_forward_pass_is_untouched():
  params, rows = params_with_divisors(), batch()
  ours, _ = jax.jit(losses)(params, rows, example_keys())
  base, _ = jax.jit(SCALED.base.losses)(params["model"], rows, example_keys())
  np.testing.assert_array_equal(ours, base)
  assert jax.tree.structure(
    jax.tree.map(np.asarray, params)
  ) == jax.tree.structure(
    SCALED.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)
  )


@pytest.mark.parametrize("inner", [sgd.sgd(0.1), adamw.adamw(0.01)])
def test_without_noise_or_clipping_nothing_but_the_divisors_differs(inner):
  """What is divided before the sum is multiplied back after it."""
  rule = rules.ClippingRule(l2_clip_norm=1e6)
  rows = batch()
  optimizer = scale_then_privatise.scale_then_privatise(inner)
  both = step_lib.PrivateStep(QUICK.losses, rule, optimizer)
  plain = step_lib.PrivateStep(QUICK.base.losses, rule, inner)
  end = []
  for step, params in (
    (both, QUICK.init(key(0))),
    (plain, QUICK.init(key(0))["model"]),
  ):
    state = step.init(params)
    accumulate, finish = jax.jit(step.accumulate), jax.jit(step.finish)
    for number in range(3):
      zeros = step.zeros(params, rows, state)
      total = accumulate(params, zeros, rows, key(5))
      params, state, _ = finish(
        params,
        state,
        total,
        noise_key=key(number),
        noise_multiplier=0.0,
        expected_batch_size=5.0,
      )
    end.append(params)
  close(end[0]["model"], end[1], rtol=1e-3)
  sizes = [np.asarray(d) for d in jax.tree.leaves(end[0]["divisors"])]
  assert max(d.max() for d in sizes) > 2 * min(d.min() for d in sizes)


def test_noise_follows_the_divisors_and_its_total_stays():
  """Monte Carlo: what the optimizer within sees of noise alone."""
  size = 2_000
  seen = []

  def note(gradients, state, params=None):
    seen.append(gradients)
    return gradients, state

  inner = optax.GradientTransformation(lambda _: optax.EmptyState(), note)
  optimizer = scale_then_privatise.scale_then_privatise(inner, b2=0.5, eps=0.2)
  params = {"model": jnp.zeros(size), "divisors": jnp.ones(size)}
  state = optimizer.init(params)
  # One update of pure signal: the second half has gradients 9 times as long.
  signal = jnp.where(jnp.arange(size) < size // 2, 1.0, 9.0)
  first = {"model": signal, "divisors": jnp.zeros(size)}
  updates, state = optimizer.update(first, state, params)
  divisors = optax.apply_updates(params, updates)["divisors"]
  assert float(jnp.mean(divisors**2)) == pytest.approx(1.0, rel=1e-5)
  now = {"model": signal, "divisors": divisors}
  for row in jax.random.normal(key(0), (50, size)):
    optimizer.update({"model": row, "divisors": row}, state, now)
  spread = np.std(np.array(seen[1:]), axis=0)
  quiet, loud = spread[: size // 2].mean(), spread[size // 2 :].mean()
  rms = np.sqrt((1 + 81) / 2)
  expected = (9 / rms + 0.2) / (1 / rms + 0.2)
  assert loud / quiet == pytest.approx(expected, rel=0.02)
  assert np.mean(spread**2) == pytest.approx(1.0, rel=0.02)


def test_a_gradient_shaped_as_its_divisors_keeps_its_norm():
  signal = {"a": jnp.array([0.1, 3.0]), "b": jnp.array([[20.0]])}
  divisors = scale_then_privatise._of_rms_one(signal)
  scaled_signal = jax.tree.map(jnp.divide, signal, divisors)
  assert float(layers.global_norm(scaled_signal)) == pytest.approx(
    float(layers.global_norm(signal)), rel=1e-5
  )


@pytest.mark.parametrize("frozen", [False, True])
def test_the_noise_on_the_divisors_is_not_read(frozen):
  optimizer = scale_then_privatise.scale_then_privatise(sgd.sgd(0.1))
  params = {
    "model": {"kernel": jnp.ones(3)},
    "divisors": {"kernel": jnp.ones(3)},
  }
  gradients = [
    {
      "model": {"kernel": jnp.arange(3.0)},
      "divisors": {"kernel": jnp.full(3, x)},
    }
    for x in (0.0, 1e9)
  ]
  if frozen:
    params = flax.core.freeze(params)
    gradients = [flax.core.freeze(g) for g in gradients]
  ends = [
    optax.apply_updates(
      params,
      optimizer.update(g, optimizer.init(params), params, noise_variance=1.0)[
        0
      ],
    )
    for g in gradients
  ]
  for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_array_equal(a, b)
  assert isinstance(ends[0], flax.core.FrozenDict) == frozen


def test_before_any_gradient_all_divisors_are_one():
  zeros = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
  for leaf in jax.tree.leaves(scale_then_privatise._divisors(zeros, 0.1)):
    np.testing.assert_allclose(leaf, 1.0, rtol=1e-6)


def test_mistakes_are_named():
  make = scale_then_privatise.scale_then_privatise
  for bad, message in (
    ({"b2": 1.0}, "b2=1.0"),
    ({"eps": 0.0}, "eps=0.0"),
  ):
    with pytest.raises(ValueError, match=message):
      make(sgd.sgd(0.1), **bad)
  with pytest.raises(ValueError, match="ScaledModel"):
    make(sgd.sgd(0.1)).init({"kernel": jnp.ones(2)})
  inner = adamw.adamw(0.1, correct_noise=True)
  params = {"model": jnp.ones(2), "divisors": jnp.ones(2)}
  optimizer = make(inner)
  with pytest.raises(ValueError, match="noise_variance"):
    optimizer.update(params, optimizer.init(params), params, noise_variance=1.0)


def test_a_whole_run_trains(tmp_path):
  """Ledger, checkpoints and evaluation know nothing of it."""
  made = small_run.make_run(tmp_path, steps=4, period=2)
  run = dataclasses.replace(
    made,
    model=scaled.ScaledModel(base=made.model),
    optimizer=scale_then_privatise.scale_then_privatise(made.optimizer),
  )
  loop.train(run, small_run.records())
  step, state = small_run.newest_state(tmp_path)
  assert step == 4
  divisors = [x for name, x in state.items() if "/divisors/" in name]
  assert divisors
  assert all(np.isfinite(d).all() and (d > 0).all() for d in divisors)
