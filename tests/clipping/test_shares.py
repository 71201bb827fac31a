"""One update's budget, shared out among what it releases."""

import math

import dp_accounting
from hypothesis import given
from hypothesis import strategies as st
import pytest

from dptrain.clipping import shares


@given(
  st.lists(st.floats(1e-4, 0.3), max_size=3),
  st.floats(0.1, 20),
  st.floats(0.01, 100),
)
def test_all_parts_cost_together_what_the_plan_prices(parts, z, sensitivity):
  multipliers = [z * shares.gradient_noise_factor(parts)]
  multipliers += [
    shares.noise_stddev(sensitivity, z, share) / sensitivity for share in parts
  ]
  # Gaussian mechanisms on parts of one vector: squares of 1 / noise add up.
  assert math.fsum(m**-2 for m in multipliers) == pytest.approx(z**-2)
  for share, multiplier in zip(parts, multipliers[1:], strict=True):
    assert multiplier**-2 == pytest.approx(share * z**-2)


def test_without_other_parts_the_gradients_have_all():
  assert shares.gradient_noise_factor([]) == 1.0
  shares.check({})


def test_the_accountant_agrees():
  z, parts = 0.9, [0.01, 0.2]
  events = [
    dp_accounting.GaussianDpEvent(z * shares.gradient_noise_factor(parts)),
    *(
      dp_accounting.GaussianDpEvent(shares.noise_stddev(1.0, z, share))
      for share in parts
    ),
  ]
  found = [
    dp_accounting.rdp.RdpAccountant().compose(event, 7).get_epsilon(1e-6)
    for event in (
      dp_accounting.ComposedDpEvent(events),
      dp_accounting.GaussianDpEvent(z),
    )
  ]
  assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("share", [0, 1, -0.1, math.nan, math.inf, True])
def test_refuses_what_is_no_share(share):
  with pytest.raises(ValueError, match=rf"some={share} must be between 0 and"):
    shares.check({"other": 0.1, "some": share})


def test_refuses_to_leave_nothing():
  with pytest.raises(ValueError, match=r"a=0\.4 and b=0\.6 leave nothing of"):
    shares.check({"a": 0.4, "b": 0.6})
  shares.check({"a": 0.4, "b": 0.59})
