"""Optimizers are told the variance of the noise on what they are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.clipping import adaptation
from dptrain.clipping import private_metrics
from dptrain.clipping import rules
from dptrain.privacy import correlated_noise
from dptrain.training import step as step_lib

WIDTH = 4000


def linear_loss(params, batch, keys):
  del keys
  return jnp.sum(batch["x"] * params["w"], axis=-1), {
    "correct": jnp.zeros(len(batch["x"])),
    "masked": jnp.ones(len(batch["x"])),
  }


def listening():
  """An optimizer whose update is (gradient - 0) and whose state is told."""

  def update(updates, state, params=None, *, noise_variance, **others):
    del state, params, others
    return updates, jnp.asarray(noise_variance)

  return optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros(()), update
  )


def finished(step, **given):
  """(update, told variance) of an update without examples: all noise."""
  params = {"w": jnp.zeros(WIDTH)}
  batch = {
    "x": jnp.zeros((2, WIDTH)),
    "example_ids": jnp.arange(2),
    "is_padding": jnp.ones(2, bool),
  }
  state = step.init(params)
  found, state, _ = step.finish(
    params,
    state,
    step.zeros(params, batch, state),
    noise_key=jax.random.key(3, impl="threefry2x32"),
    noise_multiplier=1.5,
    expected_batch_size=7.0,
    **given,
  )
  told = getattr(state, "opt_state", state)
  return np.asarray(found["w"]), float(told)


@pytest.mark.parametrize("kind", ["flat", "normalized", "automatic"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_variance_is_that_of_the_noise(kind, shared):
  rule = rules.ClippingRule(kind, 0.3)
  step = step_lib.PrivateStep(linear_loss, rule, optimizer=listening())
  if shared and kind != "automatic":
    step = dataclasses.replace(
      step,
      adaptation=adaptation.NormAdaptation(budget_share=0.2),
      metrics=private_metrics.PrivateMetrics(budget_share=0.3),
    )
  noise, told = finished(step)
  assert told == pytest.approx(np.var(noise), rel=0.1)


def test_correlated_noise_tells_its_own_variance():
  banded = correlated_noise.BandedNoise(correlated_noise.coefficients(4, 16))
  step = step_lib.PrivateStep(
    linear_loss, rules.ClippingRule("flat", 0.3), optimizer=listening()
  )
  spreads = banded.stddevs(5)
  assert spreads[0] < spreads[-1] == banded.largest_stddev(5)
  like = ({"w": jnp.zeros(WIDTH)}, None, None)
  history = banded.begin(like)
  for step_number, key in enumerate(jax.random.split(jax.random.key(0), 5)):
    fresh = ({"w": jax.random.normal(key, (WIDTH,))}, None, None)
    unit, history = banded.next(fresh, history)
    noise, told = finished(
      step, unit_noise=unit, unit_noise_stddev=spreads[step_number]
    )
    assert told == pytest.approx(np.var(noise), rel=0.12)


def test_optimizers_that_do_not_ask_are_not_told():
  step = step_lib.PrivateStep(
    linear_loss, rules.ClippingRule("flat", 0.3), optimizer=optax.sgd(1.0)
  )
  params = {"w": jnp.zeros(3)}
  batch = {"is_padding": jnp.ones(2, bool)}
  found, _, _ = step.finish(
    params,
    step.init(params),
    step.zeros(params, batch),
    noise_key=jax.random.key(3),
    noise_multiplier=0.0,
    expected_batch_size=7.0,
  )
  np.testing.assert_array_equal(found["w"], 0.0)
