"""Curves behind epsilon, held against closed forms and against accounting."""

import numpy as np
import pytest
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
