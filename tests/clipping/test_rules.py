"""Clipping rules: what they allow and what they refuse."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import rules

norms = st.floats(0, 2.0**126, width=32)
constants = st.floats(1e-3, 1e3)


@settings(deadline=None)
@given(st.sampled_from(rules.KINDS), norms, constants, constants)
def test_no_norm_exceeds_the_sensitivity(kind, norm, clip_norm, gamma):
  rule = rules.ClippingRule(kind, clip_norm, gamma)
  scale = rule.scales(jnp.asarray([norm], jnp.float32))
  assert 0 <= float(scale[0]) * norm <= rule.sensitivity * (1 + 1e-6)


def test_the_rules_formulas():
  found = np.asarray([0.0, 1.0, 2.0, 8.0], np.float32)
  scales = {
    kind: rules.ClippingRule(kind, 2.0, 0.5).scales(found)
    for kind in rules.KINDS
  }
  np.testing.assert_allclose(scales["flat"], [1, 1, 1, 0.25])
  np.testing.assert_allclose(scales["normalized"], [0.5, 0.5, 0.5, 0.125])
  np.testing.assert_allclose(scales["automatic"], 1 / (found + 0.5))


@pytest.mark.parametrize("kind", rules.KINDS)
def test_the_sensitivity_is_reached(kind):
  rule = rules.ClippingRule(kind, 2.0, 1e-3)
  assert rule.sensitivity == (2.0 if kind == "flat" else 1.0)
  reached = float(rule.scales(jnp.asarray([100.0]))[0]) * 100
  assert reached == pytest.approx(rule.sensitivity, rel=1e-4)


@pytest.mark.parametrize("name", ["l2_clip_norm", "automatic_gamma"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_refuses_constants_that_bound_nothing(name, value):
  with pytest.raises(ValueError, match=f"ClippingRule.{name}="):
    rules.ClippingRule(**{name: value})


@pytest.mark.parametrize("name", ["l2_clip_norm", "automatic_gamma"])
def test_refuses_norms_that_float32_cannot_tell(name):
  """Gradients whose squares vanish would pass unclipped."""
  entries = jnp.full(1000, 1e-20, jnp.float32)
  assert float(jnp.sum(jnp.square(entries))) == 0.0
  with pytest.raises(ValueError, match=rf"{name}=1e-11 is below 1e-10"):
    rules.ClippingRule(**{name: 1e-11})
  rules.ClippingRule(**{name: rules.SMALLEST_NORM})


def test_refuses_an_unknown_kind():
  with pytest.raises(ValueError, match=r"kind='median' is unknown.*'flat'"):
    rules.ClippingRule("median")
