"""Curves behind epsilon, held against closed forms and against accounting."""

import numpy as np
import pytest
from scipy import optimize
from scipy import stats

from dptrain.privacy import accounting
from dptrain.privacy.accounting import Releases
from dptrain.reports import curves

DELTA = 1e-5
RELEASES = [Releases(5, 0.02, 1.5), Releases(40, 0.05, 1.5)]


def test_growth_ends_at_what_is_quoted():
  grown = curves.growth(RELEASES, DELTA, "zero_out")
  quoted = accounting.epsilon(RELEASES, DELTA, quick=True)
  assert grown.updates[-1] == 45
  assert grown.by_pld[-1] == pytest.approx(quoted.pld, rel=1e-6)
  assert grown.by_rdp[-1] == pytest.approx(quoted.rdp, rel=1e-9)
  for curve in (grown.updates, grown.by_pld, grown.by_rdp, grown.unamplified):
    assert all(np.diff(curve) > 0)
  assert len(grown.updates) <= 30


def test_growth_begins_above_what_was_released_before():
  before = [Releases(1, 1.0, 2.0)]
  grown = curves.growth(RELEASES, DELTA, "zero_out", before)
  quoted = accounting.epsilon([*before, *RELEASES], DELTA, quick=True)
  assert grown.updates[-1] == 45
  assert grown.by_pld[-1] == pytest.approx(quoted.pld, rel=1e-6)
  assert grown.by_rdp[-1] == pytest.approx(quoted.rdp, rel=1e-9)
  assert grown.by_pld[0] > accounting.epsilon(before, DELTA).value


def test_failures_are_part_of_every_delta():
  without = curves.trade_off(RELEASES, 3.0, DELTA, "zero_out")
  made = curves.trade_off(RELEASES, 3.0, DELTA, "zero_out", failure_prob=2e-6)
  np.testing.assert_allclose(np.array(made.deltas) - without.deltas, 2e-6)
  assert np.all(np.array(made.type_2) <= without.type_2)


def test_the_trade_off_of_one_gaussian_is_the_closed_form():
  noise = 2.0
  made = curves.trade_off([Releases(1, 1.0, noise)], 3.0, DELTA, "zero_out")
  alarms = np.array(made.type_1)
  exact = stats.norm.cdf(stats.norm.ppf(1 - alarms) - 1 / noise)
  found = np.array(made.type_2)
  # Never above the truth; below it by the grid's width.
  assert np.all(found <= exact + 1e-9)
  assert np.max(exact - found) < 2e-3
  deltas = [
    stats.norm.cdf(0.5 / noise - e * noise)
    - np.exp(e) * stats.norm.cdf(-0.5 / noise - e * noise)
    for e in made.epsilons
  ]
  np.testing.assert_allclose(made.deltas, deltas, atol=2e-4)
  assert np.all(np.array(made.deltas) >= np.array(deltas) - 1e-9)


def test_a_group_of_one_costs_what_one_unit_costs():
  quoted = accounting.epsilon(RELEASES, DELTA).value
  found = curves.group_epsilons(RELEASES, DELTA, "zero_out", (1, 2, 4))
  assert quoted <= found[1] < 1.02 * quoted
  assert found[1] < found[2] < found[4]


def test_a_group_without_sampling_is_one_gaussian_of_k_times_the_size():
  found = curves.group_epsilons(
    [Releases(1, 1.0, 6.0)], DELTA, "zero_out", (3,)
  )
  exact = accounting.epsilon_without_amplification(
    [Releases(1, 1.0, 2.0)], DELTA
  )
  assert exact <= found[3] < 1.02 * exact


def test_groups_beyond_the_limit_are_not_computed():
  found = curves.group_epsilons(
    [Releases(20, 1.0, 1.0)], DELTA, "zero_out", (2, 4, 8)
  )
  assert found == {2: None, 4: None, 8: None}


def test_probabilities_are_rounded_up_only():
  many = [Releases(3, q / 1000, 1.0) for q in range(1, 20)]
  few = curves._rounded_up(many)
  assert len(few) <= 4
  assert sum(r.count for r in few) == 57
  ordered = sorted(r.sampling_prob for r in many for _ in range(r.count))
  coarse = sorted(r.sampling_prob for r in few for _ in range(r.count))
  assert all(a <= b for a, b in zip(ordered, coarse, strict=True))


def delta_of_gaussian(epsilon, mu):
  return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(
    epsilon
  ) * stats.norm.cdf(-mu / 2 - epsilon / mu)


# Subsampled Gaussians have heavier tails than the Gaussian of equal (epsilon,
# delta), and a lighter middle: the quoted epsilon is that of one that covers.
@pytest.mark.parametrize(
  ("releases", "delta"),
  [
    ([Releases(4, 1.0, 2.0)], 1e-5),  # itself
    (RELEASES, 1e-5),
    ([Releases(400, 0.02, 0.7)], 1e-5),
    ([Releases(1, 0.01, 0.3)], 2e-3),
  ],
)
def test_a_covering_gaussian_covers(releases, delta):
  epsilon = accounting.epsilon(releases, delta).value
  found = curves.covering_gaussian(releases, epsilon, delta, "zero_out")
  assert found >= epsilon
  assert found == pytest.approx(epsilon, rel=1e-3)
  made = curves.trade_off(releases, epsilon, delta, "zero_out")
  mu = mu_of(found, delta)
  for at, least in zip(made.epsilons, made.deltas, strict=True):
    if at < 0.99 * epsilon:
      assert delta_of_gaussian(at, mu) >= least * (1 - 1e-3) - 1e-9


def mu_of(epsilon, delta):
  return optimize.brentq(
    lambda mu: delta_of_gaussian(epsilon, mu) - delta, 1e-3, 100
  )


def test_a_claim_with_a_heavy_middle_takes_a_larger_gaussian(monkeypatch):
  # (0, 0.3)-DP and (3, 1e-5)-DP: the Gaussian of the latter has less at 0.
  curve = curves.TradeOff([0.0, 3.0], [0.3, DELTA], [], [])
  monkeypatch.setattr(curves, "trade_off", lambda *_, **__: curve)
  found = curves.covering_gaussian(RELEASES, 3.0, DELTA, "zero_out")
  assert found > 3.2
  assert delta_of_gaussian(0.0, mu_of(found, DELTA)) == pytest.approx(0.3)


@pytest.mark.parametrize("epsilon", [0.0, 60.0, np.inf])
def test_without_a_curve_nothing_is_refuted(epsilon):
  found = curves.covering_gaussian(RELEASES, epsilon, DELTA, "zero_out")
  assert found == (np.inf if epsilon else 0.0)
