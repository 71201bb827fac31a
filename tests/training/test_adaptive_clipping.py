"""Adaptive clip norms in whole updates: noise, price, tally, resumption."""

import dataclasses
import functools
from unittest import mock

import dp_accounting
from dp_accounting import pld
from dp_accounting import rdp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from dptrain.clipping import adaptation as adaptation_lib
from dptrain.clipping import rules
from dptrain.clipping import shares
from dptrain.privacy import ledger as ledger_lib
from dptrain.training import loop
from dptrain.training import step as step_lib


def key(number):
  return jax.random.key(number, impl="threefry2x32")


def losses(params, batch, keys):
  """The gradient of an example is its x."""
  del keys
  return batch["x"] @ params["w"], {}


def make_step(kind="flat", norm=2.0, rate=1.0, **settings):
  adaptive = {"budget_share": 0.1, "learning_rate": 0.2}
  adaptive |= settings.pop("adaptive", {})
  return step_lib.PrivateStep(
    losses,
    rules.ClippingRule(kind, l2_clip_norm=norm),
    optax.sgd(rate),
    adaptation=adaptation_lib.NormAdaptation(**adaptive),
    **settings,
  )


def batch_of(rows, padding=0):
  x = np.asarray(rows, np.float32)
  x = np.concatenate([x, np.full((padding, x.shape[1]), 9.0, np.float32)])
  return {
    "x": x,
    "example_ids": np.arange(len(x), dtype=np.int32),
    "is_padding": np.arange(len(x)) >= len(x) - padding,
  }


# --- Noise and price. --------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "normalized"])
def test_both_noises_have_the_stated_deviation(kind):
  """Z / sqrt(1 - s) * sensitivity on the sum, z / sqrt(s) / 2 on the tally."""
  z, share, norm, expected, draws = 0.7, 0.1, 3.0, 100.0, 20_000
  step = make_step(kind, norm, collect_statistics=False)
  params = {"w": jnp.zeros(2)}
  state = step.init(params)
  # The rule starts at another norm: noise must follow that of this update.
  state = state._replace(l2_clip_norm=jnp.float32(2 * norm))
  accumulator = step.zeros(params, batch_of(np.zeros((1, 2))), state)

  @jax.jit
  @jax.vmap
  def finish(noise_key):
    params_, state_, _ = step.finish(
      params,
      state,
      accumulator,
      noise_key=noise_key,
      noise_multiplier=z,
      expected_batch_size=expected,
    )
    return params_["w"], state_.l2_clip_norm

  moved, norms = finish(jax.random.split(key(1), draws))
  sensitivity = 2 * norm if kind == "flat" else 1.0
  of_sum = -np.asarray(moved, np.float64) * expected
  deviation = z / np.sqrt(1 - share) * sensitivity
  np.testing.assert_allclose(of_sum.std(axis=0), deviation, rtol=0.02)
  # Solved for the tally: log C falls by 0.2 * (tally / B + 1/2 - 1/2).
  of_tally = np.log(np.asarray(norms, np.float64) / (2 * norm)) / -0.2
  of_tally *= expected
  spread = 0.5 * z / np.sqrt(share)
  assert of_tally.std() == pytest.approx(spread, rel=0.02)
  assert abs(of_tally.mean()) < 5 * spread / draws**0.5
  correlations = np.corrcoef(np.c_[of_sum, of_tally].T)
  assert np.abs(correlations - np.eye(3)).max() < 5 / draws**0.5


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_parts_cost_together_what_the_plan_prices(share):
  z, updates, delta = 1.1, 5, 1e-6
  adapt = adaptation_lib.NormAdaptation(budget_share=share)
  parts = [
    dp_accounting.GaussianDpEvent(z * shares.gradient_noise_factor([share])),
    dp_accounting.GaussianDpEvent(adapt.tally_noise_stddev(z) / 0.5),
  ]
  both = dp_accounting.ComposedDpEvent(parts)
  whole = dp_accounting.GaussianDpEvent(z)
  for accountant, tolerance in (
    (rdp.RdpAccountant, 1e-9),
    (
      functools.partial(pld.PLDAccountant, value_discretization_interval=1e-4),
      1e-3,
    ),
  ):
    found = [
      accountant().compose(event, updates).get_epsilon(delta)
      for event in (both, whole)
    ]
    assert found[0] == pytest.approx(found[1], rel=tolerance)


# --- The tally, and where the norm goes. -------------------------------------


@pytest.mark.parametrize("kind", ["flat", "normalized"])
def test_the_tally_over_physical_batches_and_microbatches(kind):
  """Padding and what is not finite count for nothing, however dealt out."""
  rows = np.random.default_rng(0).normal(size=(12, 3))
  rows[5] = np.inf
  lengths = np.linalg.norm(np.delete(rows, 5, axis=0), axis=1)
  middle = float(np.sort(lengths)[4] * 1.001)
  expected = np.sum(np.where(lengths <= middle, 0.5, -0.5))
  assert expected == -0.5  # 5 shorter, 6 longer
  sums = []
  for parts, size in ((1, None), (1, 4), (3, 2), (3, 8)):
    step = make_step(kind, norm=1.0, microbatch_size=size)
    params = {"w": jnp.zeros(3)}
    state = step.init(params)._replace(l2_clip_norm=jnp.float32(middle))
    accumulator = step.zeros(params, None, state)
    accumulate = jax.jit(step.accumulate)
    for part in np.split(rows, parts):
      batch = batch_of(part, padding=4)
      accumulator = accumulate(params, accumulator, batch, key(0))
    assert float(accumulator.adapting.tally) == expected
    sums.append(np.asarray(accumulator.gradients["w"]))
  scales = np.minimum(1, middle / lengths)[:, None]
  total = np.sum(scales * np.delete(rows, 5, axis=0), axis=0)
  total /= 1 if kind == "flat" else middle
  for found in sums:
    np.testing.assert_allclose(found, total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("quantile", "start"), [(0.5, 20.0), (0.8, 0.05)])
def test_the_norm_comes_to_the_quantile_of_the_norms(quantile, start):
  draw = np.random.default_rng(1)
  rows = draw.normal(size=(400, 4)) * np.exp(draw.normal(size=(400, 1)))
  wanted = np.quantile(np.linalg.norm(rows, axis=1), quantile)
  adaptive = {"target_quantile": quantile}
  step = make_step(norm=start, microbatch_size=100, adaptive=adaptive)
  batch = batch_of(rows)

  def update(carry, noise_key):
    params, state = carry
    accumulator = step.zeros(params, batch, state)
    accumulator = step.accumulate(params, accumulator, batch, key(0))
    params, state, _ = step.finish(
      params,
      state,
      accumulator,
      noise_key=noise_key,
      noise_multiplier=1.0,
      expected_batch_size=400.0,
    )
    return (params, state), state.l2_clip_norm

  params = {"w": jnp.zeros(4)}
  first = params, step.init(params)
  keys = jax.random.split(key(2), 200)
  _, norms = jax.jit(functools.partial(jax.lax.scan, update))(first, keys)
  settled = float(jnp.exp(jnp.mean(jnp.log(norms[100:]))))
  assert settled == pytest.approx(wanted, rel=0.05)


def test_the_clip_fraction_is_that_of_the_norm_in_use():
  step = make_step(norm=100.0, collect_statistics=True)
  params = {"w": jnp.zeros(1)}
  batch = batch_of([[1.0], [2.0], [3.0], [4.0]])
  for norm, share in ((100.0, 0.0), (2.5, 0.5), (0.5, 1.0)):
    state = step.init(params)._replace(l2_clip_norm=jnp.float32(norm))
    accumulator = step.zeros(params, batch, state)
    accumulator = step.accumulate(params, accumulator, batch, key(0))
    told = step.finish(
      params,
      state,
      accumulator,
      noise_key=key(1),
      noise_multiplier=1.0,
      expected_batch_size=4.0,
    )[2]
    assert float(told["clip_fraction"]) == share


# --- The loop. ---------------------------------------------------------------


def adaptive_run(directory, **settings):
  run = small_run.make_run(
    directory, period=2, sizes=(20, 40), clipping="flat", microbatch_size=8
  )
  adaptive = {"adaptive_quantile": 0.5, "adaptive_budget_share": 0.05}
  privacy = dataclasses.replace(run.privacy, **(adaptive | settings))
  return dataclasses.replace(run, privacy=privacy)


def clip_norm(directory):
  _, state = small_run.newest_state(directory)
  (norm,) = (v for k, v in state.items() if k.endswith("l2_clip_norm"))
  return float(norm)


def test_a_run_that_is_cut_off_resumes_with_its_clip_norm(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  loop.train(adaptive_run(whole), small_run.records())
  record = ledger_lib.Ledger.record

  def cut_off(self, branch, step, *rest):
    record(self, branch, step, *rest)
    if step == 4:
      raise RuntimeError("cut off")

  with (
    mock.patch.object(ledger_lib.Ledger, "record", cut_off),
    pytest.raises(RuntimeError, match="cut off"),
  ):
    loop.train(adaptive_run(cut), small_run.records())
  step, _ = small_run.newest_state(cut)
  assert step in (2, 4)
  halfway = clip_norm(cut)
  assert halfway != pytest.approx(0.1)  # it has moved from where it began
  loop.train(adaptive_run(cut), small_run.records())
  small_run.assert_same(whole, cut)
  assert clip_norm(cut) != pytest.approx(halfway)
  report = (cut / "privacy_report.txt").read_text()
  assert "It adapts to the 0.5 quantile" in " ".join(report.split())
  with pytest.raises(ledger_lib.LedgerError, match="adaptive_quantile was"):
    loop.train(adaptive_run(cut, adaptive_quantile=0.6), small_run.records())


# --- Bad input. --------------------------------------------------------------


def test_automatic_clipping_has_nothing_to_adapt():
  with pytest.raises(ValueError, match="automatic clipping has no clip norm"):
    make_step("automatic")


def test_an_accumulator_needs_the_norm():
  step, params = make_step(), {"w": jnp.zeros(1)}
  for state in (None, optax.sgd(1.0).init(params)):
    with pytest.raises(ValueError, match=r"zeros\(\) needs the opt_state"):
      step.zeros(params, None, state)


@pytest.mark.parametrize("size", [0, -4])
def test_a_microbatch_of_no_rows_is_refused(size):
  with pytest.raises(
    ValueError, match=rf"PrivateStep.microbatch_size={size} must be a positive"
  ):
    make_step(microbatch_size=size)


def test_a_microbatch_that_does_not_divide_is_refused():
  step, params = make_step(microbatch_size=3), {"w": jnp.zeros(1)}
  accumulator = step.zeros(params, None, step.init(params))
  with pytest.raises(ValueError, match="microbatch_size=3 does not divide"):
    step.accumulate(params, accumulator, batch_of([[1.0]] * 4), key(0))
