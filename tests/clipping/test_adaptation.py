"""The tally of short gradients, and how the clip norm follows it."""

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import adaptation
from dptrain.clipping import rules
from dptrain.clipping import shares

norms = st.lists(
  st.tuples(st.floats(0, 10, width=32) | st.just(math.nan), st.booleans()),
  min_size=1,
  max_size=9,
)


@settings(deadline=None)
@given(norms, st.floats(0.125, 10, width=32))
def test_the_tally_is_the_naive_count(drawn, clip_norm):
  adapt = adaptation.NormAdaptation()
  found = adapt.tally(
    jnp.asarray([norm for norm, _ in drawn], jnp.float32),
    jnp.asarray([takes_part for _, takes_part in drawn]),
    jnp.float32(clip_norm),
  )
  expected = [0.5 if n <= clip_norm else -0.5 for n, takes in drawn if takes]
  assert float(found) == sum(expected)
  # One example more or less moves it by a half.
  without = adapt.tally(
    jnp.asarray([norm for norm, _ in drawn], jnp.float32),
    jnp.asarray([False, *(takes for _, takes in drawn[1:])]),
    jnp.float32(clip_norm),
  )
  assert abs(float(found - without)) in (0, 0.5)


@pytest.mark.parametrize(
  ("counted", "factor"),
  [
    (10, math.exp(-0.2 * 0.3)),  # all 20 examples: share 1
    (-10, math.exp(0.2 * 0.7)),  # none: share 0
    (4, 1.0),  # 14 of 20: as wanted
    (99, math.exp(-0.2 * 0.3)),  # more than there are: noise
    (-99, math.exp(0.2 * 0.7)),
  ],
)
def test_the_norm_moves_towards_the_quantile(counted, factor):
  adapt = adaptation.NormAdaptation(target_quantile=0.7, learning_rate=0.2)
  moved = adapt.moved(jnp.float32(3.0), jnp.float32(counted), 20.0)
  assert float(moved) == pytest.approx(3.0 * factor, rel=1e-6)


@pytest.mark.parametrize(
  ("tally", "limit"),
  [(50.0, rules.SMALLEST_NORM), (-50.0, adaptation.LARGEST_NORM)],
)
def test_the_norm_never_leaves_what_float32_can_bound(tally, limit):
  """Gradients that vanish, or explode, for thousands of updates."""
  adapt = adaptation.NormAdaptation(learning_rate=30.0)
  norm = jnp.float32(1.0)
  for _ in range(20):
    norm = adapt.moved(norm, jnp.float32(tally), 100.0)
  assert float(norm) == pytest.approx(limit, rel=1e-6)
  for kind in ("flat", "normalized"):
    rule = rules.ClippingRule(kind, norm)
    for length in (0.0, 1e-12, 1.0, 1e18):
      scaled = rule.scales(jnp.asarray([length], jnp.float32))[0] * length
      assert np.isfinite(scaled)
      assert float(scaled) <= float(rule.sensitivity) * (1 + 1e-6)


def test_the_two_noises_share_one_budget():
  for share in (0.01, 0.3):
    adapt = adaptation.NormAdaptation(budget_share=share)
    of_gradients = 1.3 * shares.gradient_noise_factor([share])
    of_tally = adapt.tally_noise_stddev(1.3) / 0.5
    assert of_gradients**-2 + of_tally**-2 == pytest.approx(1.3**-2)
    assert of_tally**-2 == pytest.approx(share * 1.3**-2)


@pytest.mark.parametrize("name", ["target_quantile", "budget_share"])
@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, math.inf, True])
def test_refuses_what_is_no_share(name, value):
  with pytest.raises(
    ValueError, match=rf"NormAdaptation.{name}={value} must be between 0 and 1"
  ):
    adaptation.NormAdaptation(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_refuses_a_rate_that_does_not_move(value):
  with pytest.raises(ValueError, match=r"learning_rate=.* positive and finite"):
    adaptation.NormAdaptation(learning_rate=value)
