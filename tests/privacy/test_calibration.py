"""How little is asked of the accountant for how much noise a budget takes."""

import pytest

from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.privacy.accounting import Releases
from dptrain.reports import forecast as forecast_lib

N, DELTA = 30_000, 1e-6


def ramp(*, sizes=64, first=100, last=4000, ramp="linear", noise=1.0):
  """Five updates of each of so many sizes."""
  made = schedule.BatchSchedule([schedule.Phase(first, last, 5 * sizes, ramp)])
  return tuple(
    Releases(s.num_steps, s.expected_batch_size / N, noise)
    for s in made.segments()
  )


@pytest.fixture
def asked(monkeypatch):
  """The releases that PLD is asked to price, each once."""
  priced, price = set(), accounting.pld_bound

  def counted(composed, delta, relation, interval):
    priced.add(composed)
    return price(composed, delta, relation, interval)

  monkeypatch.setattr(accounting, "pld_bound", counted)
  return priced


@pytest.mark.parametrize("shape", ["linear", "geometric"])
def test_a_long_schedule_is_priced_whole_a_few_times(asked, shape):
  settings = plan_lib.PrivacySettings(
    schedule=schedule.BatchSchedule(
      [schedule.Phase(100, 4000, 320, shape)], max_distinct_sizes=32
    ),
    delta=DELTA,
    target_epsilon=6.0,
  )
  made = forecast_lib.forecast(plan_lib.make_plan(settings, N))
  assert 5.98 < made.epsilon.value <= 6.0
  assert made.affordable_steps == 320
  # The noise that fits, the next smaller one that does not, and a first guess.
  assert sum(len(composed) > 8 for composed in asked) <= 4
  assert len(asked) <= 14


def test_the_noise_is_the_smallest_whatever_the_search_read():
  made = calibration.noise_multiplier(
    lambda noise: ramp(sizes=20, ramp="geometric", noise=noise), 3.0, DELTA
  )
  smaller = round(made - 1e-4, 4)
  price = [
    accounting.epsilon(
      ramp(sizes=20, ramp="geometric", noise=noise), DELTA
    ).value
    for noise in (made, smaller)
  ]
  assert price[0] <= 3.0 < price[1]


@pytest.mark.parametrize("shape", ["linear", "geometric"])
def test_thinned_releases_cost_about_as_much(shape):
  whole = ramp(ramp=shape)
  few = calibration._thinned(whole)
  assert len(few) == 8
  assert sum(r.count for r in few) == sum(r.count for r in whole)
  price = [
    accounting.rdp_bound(r, DELTA, "zero_out", accounting.FEW_RDP_ORDERS)[0]
    for r in (few, whole)
  ]
  assert price[0] == pytest.approx(price[1], rel=0.02)


def test_only_alike_releases_are_thinned():
  whole = (*ramp(sizes=10, noise=1.0), *ramp(sizes=10, noise=2.0))
  few = calibration._thinned(whole)
  assert {r.noise_multiplier for r in few} == {1.0, 2.0}
  assert calibration._thinned(few[:8]) == few[:8]


@pytest.mark.parametrize(
  "releases",
  [
    (Releases(1, 1.0, 30.0),),
    (Releases(20_000, 0.003, 0.8),),
    (Releases(100_000, 0.0001, 0.5),),
    (Releases(3, 0.5, 0.4),),
    (Releases(40, 0.01, 12.0), Releases(2, 0.9, 3.0)),
  ],
)
def test_the_best_order_is_found_among_all_of_them(releases):
  asked = (DELTA, "zero_out")
  assert accounting.best_rdp(releases, *asked) == accounting.rdp_bound(
    releases, *asked, accounting.RDP_ORDERS
  )


def test_the_papers_schedule_at_its_epsilon():
  """Of arXiv 2108.01624: 262,144 to 1,048,576 in 7,500 of 20,000 updates."""

  def cost(noise):
    settings = plan_lib.PrivacySettings(
      schedule=schedule.BatchSchedule(
        [
          schedule.Phase(262_144, 1_048_576, 7_500),
          schedule.Phase(1_048_576, 1_048_576, 20_000),
        ]
      ),
      delta=2.89e-9,
      noise_multiplier=noise,
    )
    made = plan_lib.make_plan(settings, 346_000_000)
    assert len(made.releases()) == 63  # the ramp ends at the last size
    return accounting.epsilon(made.releases(), made.delta).value

  # Between the constant batches of the table: 0.580 and 0.801.
  assert cost(0.768) <= 5.36 < cost(0.767)
