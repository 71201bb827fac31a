from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from dptrain.optimizers import learning_rate

DECAYS = [learning_rate.warmup_linear_decay, learning_rate.warmup_cosine_decay]


@pytest.mark.parametrize("factory", DECAYS)
@settings(max_examples=20, deadline=None)
@given(
  peak=st.floats(1e-5, 10.0),
  warmup=st.integers(0, 20),
  decay=st.integers(1, 20),
  fraction=st.floats(0.0, 1.0),
)
def test_rises_to_the_peak_then_falls_to_the_end(
  factory, peak, warmup, decay, fraction
):
  end = peak * fraction
  total = warmup + decay
  schedule = factory(peak, warmup, total, end)
  rates = np.array([schedule(t) for t in range(total + 2)], np.float64)
  slack = 1e-5 * peak
  assert (rates[:total] > 0).all(), "no update may be spent on nothing"
  assert rates[warmup] == pytest.approx(peak, rel=1e-5)
  assert (np.diff(rates[: warmup + 1]) > 0).all()
  assert (np.diff(rates[warmup:]) <= slack).all()
  assert rates[total:] == pytest.approx(end, rel=1e-5, abs=slack)
  rise = peak * (np.arange(warmup) + 1) / (warmup + 1)
  np.testing.assert_allclose(rates[:warmup], rise, rtol=1e-5)


def test_exponential_decay_loses_its_factor_in_its_steps():
  schedule = learning_rate.warmup_exponential_decay(2**-7, 1000, 0.1, 128_000)
  assert float(schedule(1000)) == pytest.approx(2**-7)
  assert float(schedule(129_000)) == pytest.approx(2**-7 / 10, rel=1e-5)


def test_schedules_trace_under_jit():
  schedule = jax.jit(learning_rate.warmup_cosine_decay(1.0, 2, 6))
  assert float(schedule(2)) == pytest.approx(1.0)


@pytest.mark.parametrize(
  ("factory", "arguments", "message"),
  [
    (learning_rate.constant, (0.0,), "value=0.0"),
    (learning_rate.warmup_linear_decay, (0.0, 1, 2), "peak=0.0"),
    (learning_rate.warmup_linear_decay, (1.0, -1, 2), "warmup_steps=-1"),
    (learning_rate.warmup_linear_decay, (1.0, 2, 2), "total_steps=2"),
    (learning_rate.warmup_cosine_decay, (1.0, 0, 2, 1.5), "end=1.5"),
    (
      learning_rate.warmup_exponential_decay,
      (1.0, 0, 0.0, 2),
      "decay_rate=0.0",
    ),
    (
      learning_rate.warmup_exponential_decay,
      (1.0, 0, 0.5, 0),
      "decay_steps=0",
    ),
  ],
)
def test_refuses_bad_settings_by_name(factory, arguments, message):
  with pytest.raises(ValueError, match=message):
    factory(*arguments)
