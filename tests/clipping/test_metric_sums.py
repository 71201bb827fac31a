"""Sums of private metrics against a loop in float64, and what bounds them."""

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import per_example
from dptrain.clipping import private_metrics

ANY = st.floats(width=32, allow_subnormal=False)  # with nan and infinities
EXAMPLES = st.lists(
  st.tuples(ANY, ANY, ANY, st.integers(0, 9) | ANY, st.booleans()),
  min_size=6,
  max_size=6,
)


def clipped(examples):
  """As if seen while clipping: loss, norm, correct, masked, takes part."""
  columns = list(zip(*examples, strict=True))
  losses, norms, correct, masked = (
    jnp.asarray(column, jnp.float32) for column in columns[:4]
  )
  return per_example.ClippedSum(
    gradients=None,
    losses=losses,
    norms=norms,
    contributes=jnp.asarray(columns[4]),
    aux={"correct": correct, "masked": masked, "other": losses},
  )


def bounded(value, largest):
  scaled = 0.0 if math.isnan(value) else min(max(value / largest, 0.0), 1.0)
  return scaled - 0.5


def naive(metrics, examples, clip_norm):
  """The definition, one example after another, in float64."""
  total = np.zeros(len(metrics.names))
  for loss, norm, correct, masked, takes_part in examples:
    if not takes_part:
      continue
    values = {
      "loss": loss,
      "accuracy": correct / masked if masked > 0 else 0.0,
      "clip_fraction": float(norm > clip_norm),
      "gradient_norm": norm / clip_norm,
    }
    total += [
      bounded(values[name], metrics.ranges[name]) for name in metrics.names
    ]
  return total


@settings(deadline=None)
@given(EXAMPLES, st.floats(0.125, 8, width=32))
def test_the_sums_are_those_of_a_naive_loop(examples, clip_norm):
  metrics = private_metrics.PrivateMetrics(max_loss=6.0, max_norm=3.0)
  found = metrics.sums(clipped(examples), jnp.float32(clip_norm))
  expected = naive(metrics, examples, clip_norm)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(deadline=None)
@given(EXAMPLES, st.sets(st.sampled_from(private_metrics.NAMES), min_size=1))
def test_an_example_moves_the_sums_by_the_sensitivity_at_most(examples, names):
  metrics = private_metrics.PrivateMetrics(names=tuple(sorted(names)))
  first, rest = examples[0], examples[1:]
  parts = [
    np.asarray(metrics.sums(clipped([one, *rest]), 1.0), np.float64)
    for one in ((*first[:4], True), (*first[:4], False))
  ]
  moved = np.linalg.norm(parts[0] - parts[1])
  assert moved <= metrics.sensitivity * (1 + 1e-5)


def test_the_sensitivity_is_reached():
  metrics = private_metrics.PrivateMetrics()
  found = metrics.sums(clipped([(99.0, 99.0, 3.0, 3.0, True)]), 1.0)
  assert np.linalg.norm(found) == metrics.sensitivity == 1.0


def test_without_noise_means_are_means():
  examples = [
    (2.0, 0.5, 1.0, 4.0, True),
    (4.0, 2.0, 0.0, 0.0, True),  # nothing masked: nothing right
    (9.0, 3.0, 3.0, 4.0, True),  # beyond the range of losses
    (3.0, 9.0, 9.0, 9.0, False),
  ]
  metrics = private_metrics.PrivateMetrics(max_loss=6.0, max_norm=2.0)
  told = metrics.released(metrics.sums(clipped(examples), 1.0), 3.0)
  assert {name: float(value) for name, value in told.items()} == pytest.approx(
    {
      "private/loss": (2 + 4 + 6) / 3,
      "private/accuracy": (1 / 4 + 0 + 3 / 4) / 3,
      "private/clip_fraction": 2 / 3,
      "private/gradient_norm": (0.5 + 2 + 2) / 3,
    }
  )
  # The realised batch shows only times the distance from the centre.
  told = metrics.released(metrics.sums(clipped(examples), 1.0), 4.0)
  assert float(told["private/loss"]) == pytest.approx(3 + (4 - 3) * 3 / 4)


def test_noise_is_stated_in_the_metrics_units():
  metrics = private_metrics.PrivateMetrics(
    budget_share=0.04, names=("loss", "accuracy"), max_loss=8.0
  )
  of_sums = 1.5 / 0.2 * math.sqrt(2) / 2
  assert metrics.noise_stddev(1.5) == pytest.approx(of_sums)
  assert metrics.noise_of_means(1.5, 50) == pytest.approx(
    {"loss": 8 * of_sums / 50, "accuracy": of_sums / 50}
  )


def test_released_metrics_are_told_from_all_others():
  told = {"private/loss": 1, "loss": 2, "clip_fraction": 3}
  released, rest = private_metrics.separated(told)
  assert released == {"loss": 1}
  assert rest == {"loss": 2, "clip_fraction": 3}


# --- Bad input. --------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, True])
def test_refuses_what_is_no_share(value):
  with pytest.raises(
    ValueError, match=rf"budget_share={value} must be between"
  ):
    private_metrics.PrivateMetrics(budget_share=value)


@pytest.mark.parametrize("name", ["max_loss", "max_norm"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True])
def test_refuses_what_is_no_range(name, value):
  with pytest.raises(ValueError, match=rf"PrivateMetrics.{name}={value} must"):
    private_metrics.PrivateMetrics(**{name: value})


@pytest.mark.parametrize("names", [(), ("loss", "loss"), ("perplexity",)])
def test_refuses_names_that_it_does_not_know(names):
  with pytest.raises(
    ValueError, match=r"names=.*name one or more of loss, acc"
  ):
    private_metrics.PrivateMetrics(names=names)


def test_accuracy_needs_a_loss_that_tells_it():
  seen = clipped([(1.0, 1.0, 1.0, 1.0, True)])
  metrics = private_metrics.PrivateMetrics()
  for aux in ({}, None, {"correct": seen.losses}):
    with pytest.raises(ValueError, match="returns no 'correct' and 'masked'"):
      metrics.sums(seen._replace(aux=aux), 1.0)
  per_token = {"correct": jnp.ones((1, 3)), "masked": jnp.ones((1, 3))}
  with pytest.raises(ValueError, match=r"shapes \(1, 3\) .* one number per"):
    metrics.sums(seen._replace(aux=per_token), 1.0)
  without = private_metrics.PrivateMetrics(names=("loss", "gradient_norm"))
  assert without.sums(seen._replace(aux=None), 1.0).shape == (2,)
