"""Each sampling has the price of what it draws, or none."""

import dp_accounting
from dp_accounting import pld
from dp_accounting import rdp
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import mechanisms
from dptrain.privacy.mechanisms import Releases

DELTA = 1e-6
NAMES = dp_accounting.NeighboringRelation


def price(release, relation):
  return accounting.epsilon([release], DELTA, relation)


def truncated(cap, noise=2.0, count=20):
  return Releases(count, 0.1, noise, "truncated_poisson", 1000, cap)


def fixed_size(noise=2.0, count=20):
  return Releases(count, 0.1, noise, "without_replacement", 1000)


def test_every_sampling_has_a_price_or_is_refused():
  for relation in mechanisms.RELATIONS:
    for release in (Releases(20, 0.1, 2.0), truncated(150), fixed_size()):
      if relation in mechanisms.PRICED[release.sampling]:
        assert 0 < price(release, relation).value < 20
      else:
        with pytest.raises(ValueError, match=r"relation=.* cannot be priced"):
          price(release, relation)


@pytest.mark.parametrize("kind", [Releases(1, 1.0, 2.0), truncated(1000)])
def test_a_replaced_record_moves_the_sum_twice_as_far(kind):
  # Everyone takes part, so neighbours are two Gaussians at distance 2.
  kind = Releases(1, 1.0, 2.0, kind.sampling, 1000, 1000)
  expected = dp_accounting.get_epsilon_gaussian(1.0, DELTA)
  found = price(kind, "replace_one").value
  assert expected <= found <= 1.01 * expected
  bound = accounting.epsilon_without_amplification([kind], DELTA, "replace_one")
  assert bound == pytest.approx(expected, rel=1e-6)


def test_a_whole_fixed_size_sample_is_a_gaussian_at_distance_two():
  whole = Releases(1, 1.0, 2.0, "without_replacement", 1000)
  renyi = rdp.RdpAccountant(accounting.RDP_ORDERS, NAMES.REPLACE_ONE)
  renyi.compose(dp_accounting.GaussianDpEvent(1.0))
  found = price(whole, "replace_one")
  assert found.value == pytest.approx(renyi.get_epsilon(DELTA), rel=1e-9)
  assert found.accountant == "RDP"
  assert found.pld is None
  assert "PLD not computed: dp-accounting has none" in found.note


def test_replace_one_costs_more_than_zero_out():
  some = Releases(50, 0.1, 2.0)
  one, other = (price(some, r) for r in ("zero_out", "replace_one"))
  assert one.value < other.value
  assert other.rdp is None
  assert "RDP not computed" in other.note
  # And no more than two zero-outs, one after the other, at their own deltas.
  halves = accounting.epsilon([some], 1e-7, "zero_out").value
  assert other.value < 2 * halves


def test_a_limit_that_is_never_reached_is_free():
  whole = price(Releases(20, 0.1, 2.0), "zero_out").value
  high, low = (price(truncated(cap), "zero_out").value for cap in (180, 110))
  assert high == pytest.approx(whole, rel=1e-3)
  assert low > 1.2 * whole


def test_truncation_is_dp_accountings_own():
  losses = pld.PLDAccountant(NAMES.REPLACE_SPECIAL, 1e-3)
  losses.compose(
    dp_accounting.SelfComposedDpEvent(
      dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 120, 2.0), 20
    )
  )
  found = price(truncated(120), "zero_out")
  assert found.value == pytest.approx(losses.get_epsilon(DELTA), rel=1e-3)


def test_samplings_that_no_accountant_takes_together_are_refused():
  # PLD alone prices the one, RDP alone the other.
  both = [Releases(5, 0.1, 2.0), fixed_size()]
  with pytest.raises(ValueError, match="have no price in dp-accounting"):
    accounting.epsilon(both, DELTA, "replace_one")


def test_the_fallback_is_recorded_and_no_smaller_than_the_bound():
  # PLD alone prices it, and would take too much memory here.
  costly = Releases(4000, 0.5, 0.5)
  found = price(costly, "replace_one")
  assert found.accountant == "Gaussian"
  assert found.settings == "no amplification"
  assert found.rdp is found.pld is None
  assert found.note == (
    "PLD not computed: the bound by a Poisson stand-in exceeds 50"
  )
  exact = dp_accounting.get_epsilon_gaussian(0.25 / 4000**0.5, DELTA)
  assert found.value == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
  ("kind", "relation"),
  [
    (lambda noise: Releases(20, 0.1, noise), "replace_one"),
    (lambda noise: truncated(120, noise), "zero_out"),
    (lambda noise: fixed_size(noise), "replace_one"),
  ],
)
def test_noise_is_calibrated_for_every_sampling(kind, relation):
  noise = calibration.noise_multiplier(
    lambda noise: [kind(noise)], 3.0, DELTA, relation
  )
  assert price(kind(noise), relation).value <= 3.0
  assert price(kind(noise - 0.002), relation).value > 3.0


def test_an_unknown_sampling_is_refused():
  with pytest.raises(ValueError, match=r"sampling='at will' is not known; use"):
    price(Releases(1, 0.1, 1.0, "at will"), "zero_out")


def test_plain_data_holds_what_a_sampling_reads():
  assert Releases(9, 0.1, 2.0).as_dict() == {
    "sampling_prob": 0.1,
    "noise_multiplier": 2.0,
  }
  for release in (truncated(120), fixed_size()):
    assert Releases(20, **release.as_dict()) == release
