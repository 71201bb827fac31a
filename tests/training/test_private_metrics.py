"""Private metrics in one update: sums, noise, and what one example moves."""

import functools
from unittest import mock

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.clipping import adaptation as adaptation_lib
from dptrain.clipping import methods
from dptrain.clipping import private_metrics
from dptrain.clipping import rules
from dptrain.privacy import noise
from dptrain.training import step as step_lib

ROWS, WIDTH = 6, 3


def key(number):
  return jax.random.key(number, impl="threefry2x32")


def losses(params, batch, keys):
  """The gradient of an example is its x; loss and accuracy are as given."""
  del keys
  value = batch["x"] @ params["w"]
  told = batch["loss"] - jax.lax.stop_gradient(value)
  return value + told, {"correct": batch["correct"], "masked": batch["masked"]}


def make_step(kind="flat", norm=2.0, adapting=False, **options):
  metrics = options.pop("metrics", {"budget_share": 0.1, "max_loss": 4.0})
  return step_lib.PrivateStep(
    losses,
    rules.ClippingRule(kind, l2_clip_norm=norm),
    optax.sgd(1.0),
    adaptation=adaptation_lib.NormAdaptation(budget_share=0.2)
    if adapting
    else None,
    metrics=private_metrics.PrivateMetrics(**metrics) if metrics else None,
    **options,
  )


def batch_of(x, loss, correct, masked, is_padding=None):
  x = np.asarray(x, np.float32)
  return {
    "x": x,
    "loss": np.asarray(loss, np.float32),
    "correct": np.asarray(correct, np.float32),
    "masked": np.asarray(masked, np.float32),
    "example_ids": np.arange(len(x), dtype=np.int32),
    "is_padding": np.zeros(len(x), bool)
    if is_padding is None
    else np.asarray(is_padding),
  }


def finish(step, params, state, accumulator, noise_key, z=0.7, size=100.0):
  return step.finish(
    params,
    state,
    accumulator,
    noise_key=noise_key,
    noise_multiplier=z,
    expected_batch_size=size,
  )


# --- Sums. -------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers():
  draw = np.random.default_rng(0)
  x = draw.normal(size=(12, WIDTH)) * np.exp(draw.normal(size=(12, 1)))
  masked = draw.integers(0, 4, 12)  # of some examples nothing is masked
  correct = draw.integers(0, masked + 1)
  loss = draw.uniform(0, 6, 12)
  loss[3] = np.nan  # with a finite gradient
  x[7, 0] = np.inf  # with a finite loss
  return {"x": x, "loss": loss, "correct": correct, "masked": masked}


def of_one(loss, x, correct, masked, norm):
  """What one example adds, by the definition in float64."""
  values = [
    np.clip(loss / 4, 0, 1),
    correct / masked if masked else 0,
    float(np.linalg.norm(x) > norm),
    np.clip(np.linalg.norm(x) / norm / 10, 0, 1),
  ]
  return np.asarray(values) - 0.5


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize(("parts", "size"), [(1, None), (1, 4), (3, 2), (3, 8)])
def test_sums_over_physical_batches_and_microbatches(
  numbers, parts, size, method
):
  """Padding and what is not finite add nothing, however dealt out."""
  norm = 1.5
  step = make_step(norm=norm, microbatch_size=size, clipping_method=method)
  params = {"w": jnp.zeros(WIDTH)}
  accumulator = step.zeros(params, None)
  accumulate = jax.jit(step.accumulate)
  for part in np.split(np.arange(12), parts):
    padded = np.concatenate([part, np.zeros(4, int)])  # as rows of padding
    batch = batch_of(
      **{name: value[padded] for name, value in numbers.items()},
      is_padding=np.arange(len(padded)) >= len(part),
    )
    accumulator = accumulate(params, accumulator, batch, key(0))
  rows = [
    {name: value[i] for name, value in numbers.items()}
    for i in range(12)
    if i not in (3, 7)
  ]
  expected = np.sum([of_one(**row, norm=norm) for row in rows], axis=0)
  np.testing.assert_allclose(accumulator.metrics, expected, atol=1e-5)


# --- Noise. ------------------------------------------------------------------


@pytest.mark.parametrize("adapting", [False, True])
@pytest.mark.parametrize("kind", ["flat", "normalized"])
def test_all_noises_have_the_stated_deviation(kind, adapting):
  """Over many updates of the same sums, against what is told of each."""
  z, norm, expected, draws = 0.7, 3.0, 100.0, 20_000
  metrics = {"budget_share": 0.1, "max_loss": 4.0}
  step = make_step(kind, norm, adapting, metrics=metrics)
  params = {"w": jnp.zeros(2)}
  state = step.init(params)
  batch = batch_of(np.ones((1, 2)), [3.0], [1], [2])
  empty = step.zeros(params, batch, state)
  accumulator = step.accumulate(params, empty, batch, key(0))

  @jax.jit
  @jax.vmap
  def finished(noise_key):
    params_, state_, told = finish(
      step, params, state, accumulator, noise_key, z, expected
    )
    norms = state_.l2_clip_norm if adapting else jnp.zeros(())
    return params_["w"], norms, [told[f"private/{n}"] for n in names]

  names = step.metrics.names
  moved, norms, told = finished(jax.random.split(key(1), draws))
  of_sum = -np.asarray(moved, np.float64) * expected
  left = 1 - 0.1 - (0.2 if adapting else 0)
  sensitivity = norm if kind == "flat" else 1.0
  deviation = z / np.sqrt(left) * sensitivity
  np.testing.assert_allclose(of_sum.std(axis=0), deviation, rtol=0.02)
  stated = step.metrics.noise_of_means(z, expected)
  # Four metrics in [-1/2, 1/2]: sensitivity 1.
  assert stated["accuracy"] == pytest.approx(z / np.sqrt(0.1) / expected)
  for name, values in zip(names, np.asarray(told, np.float64), strict=True):
    assert values.std() == pytest.approx(stated[name], rel=0.02)
    # One example where 100 were expected: 1 % of it, 99 % of the centre.
    value = {"loss": 3.0, "accuracy": 0.5, "clip_fraction": 0.0}.get(
      name, 2**0.5 / norm
    )
    centre = step.metrics.ranges[name] / 2
    mean = centre + (value - centre) / expected
    assert abs(values.mean() - mean) < 5 * stated[name] / draws**0.5
  columns = [of_sum, *np.asarray(told, np.float64)[:, :, None]]
  if adapting:
    columns.append(np.log(np.asarray(norms, np.float64))[:, None])
  correlations = np.corrcoef(np.concatenate(columns, axis=1).T)
  assert np.abs(correlations - np.eye(len(correlations))).max() < (
    5 / draws**0.5
  )


@functools.cache
def released_with(kind, adapting):
  """A step; its `accumulate`; the noise's deviation on each coordinate."""
  step = make_step(kind, adapting=adapting)
  params = {"w": jnp.zeros(WIDTH)}
  state = step.init(params)
  accumulator = step.zeros(params, None, state)

  def with_noise(unit):
    def fixed(noise_key, tree, stddev):
      return jax.tree.map(lambda x: jnp.full(x.shape, unit * stddev), tree)

    with mock.patch.object(noise, "gaussian_like", fixed):
      params_, state_, told = finish(
        step, params, state, accumulator, key(0), z=1.0, size=1000.0
      )
    coordinates = [-1000.0 * np.asarray(params_["w"], np.float64)]
    if adapting:  # solved for the tally
      told_norm = np.log(float(state_.l2_clip_norm) / 2.0)
      rate = step.adaptation.learning_rate
      coordinates.append([-1000.0 * told_norm / rate])
    for name, largest in step.metrics.ranges.items():
      value = float(told[f"private/{name}"]) / largest
      coordinates.append([1000.0 * value])
    return np.concatenate(coordinates)

  deviations = with_noise(1.0) - with_noise(0.0)
  return step, jax.jit(step.accumulate), deviations


EXTREME = st.floats(width=32) | st.sampled_from([0.0, 1e30, -1e30, 4.0])
EXAMPLE = st.tuples(
  st.lists(EXTREME, min_size=WIDTH, max_size=WIDTH), EXTREME, EXTREME, EXTREME
)


@pytest.mark.parametrize("adapting", [False, True])
@pytest.mark.parametrize("kind", ["flat", "normalized"])
@settings(deadline=None, max_examples=40)
@given(data=st.lists(EXAMPLE, min_size=ROWS, max_size=ROWS))
def test_one_example_moves_the_whole_release_by_no_more_than_is_priced(
  kind, adapting, data
):
  """Scaled by its own noise, the joint vector of an update moves by 1 / z."""
  step, accumulate, deviations = released_with(kind, adapting)
  params = {"w": jnp.zeros(WIDTH)}
  empty = step.zeros(params, None, step.init(params))
  columns = list(zip(*data, strict=True))
  vectors = []
  for absent in (False, True):
    batch = batch_of(*columns, is_padding=[absent] + [False] * (ROWS - 1))
    total = accumulate(params, empty, batch, key(0))
    tally = [total.adapting.tally] if adapting else []
    parts = [total.gradients["w"], tally, total.metrics]
    vectors.append(np.concatenate([np.asarray(p, np.float64) for p in parts]))
  moved = (vectors[0] - vectors[1]) / deviations
  assert np.linalg.norm(moved) <= 1.0 + 1e-3  # z is 1


def test_the_draws_of_the_gradients_noise_are_those_without_metrics():
  """Metrics make it larger, and change nothing else."""
  params = {"w": jnp.zeros(WIDTH)}
  noises = []
  for step in (make_step(metrics=None), make_step()):
    empty = step.zeros(params, None)
    state = step.init(params)
    noises.append(finish(step, params, state, empty, key(4))[0]["w"])
  ratio = np.asarray(noises[1]) / np.asarray(noises[0])
  np.testing.assert_allclose(ratio, 1 / np.sqrt(0.9), rtol=1e-6)


def test_shares_of_a_step_that_leave_nothing_are_refused():
  with pytest.raises(ValueError, match=r"=0\.2 and .*=0\.8 leave nothing"):
    make_step(adapting=True, metrics={"budget_share": 0.8})
