"""Forecasts: the cost of a plan, and others at the same epsilon."""

import json

import pytest

from dptrain.privacy import accounting
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.privacy.accounting import Releases
from dptrain.reports import forecast as forecast_lib

N, DELTA = 10_000, 1e-6


def plan(**changes):
  settings = {
    "schedule": schedule.BatchSchedule(
      [schedule.Phase(100, 100, 10), schedule.Phase(400, 400, 30)]
    ),
    "delta": DELTA,
    "noise_multiplier": 1.5,
  }
  return plan_lib.make_plan(plan_lib.PrivacySettings(**settings | changes), N)


def test_epsilon_is_that_of_the_releases():
  made = forecast_lib.forecast(plan())
  releases = [Releases(10, 0.01, 1.5), Releases(20, 0.04, 1.5)]
  assert made.epsilon == accounting.epsilon(releases, DELTA)
  assert made.examples == 10 * 100 + 20 * 400
  assert made.epochs == pytest.approx(0.9)
  assert made.affordable_steps is None


def test_a_budget_and_a_noise_multiplier_give_the_number_of_updates():
  whole = forecast_lib.forecast(plan()).epsilon.value
  made = forecast_lib.forecast(plan(target_epsilon=0.7 * whole))
  steps = made.affordable_steps
  assert 0 < steps < 30

  def cost(n):
    return accounting.epsilon(plan().releases(0, n), DELTA).value

  assert cost(steps) <= 0.7 * whole < cost(steps + 1)


def test_phases_tell_probability_and_noise_batch_ratio():
  first, second = forecast_lib.forecast(plan()).phases
  assert (first.first_step, first.num_steps) == (0, 10)
  assert second.sampling_prob == 0.04
  assert second.noise_batch_ratio == 1.5 / 400


def test_private_metrics_are_told_with_their_noise():
  made = forecast_lib.forecast(plan(private_metrics_share=0.01))
  assert made.epsilon == forecast_lib.forecast(plan()).epsilon
  # 1.5 / 0.1 examples, of 100 and of 400.
  told = "private metrics         1 % of the budget; noise on accuracy 0.15 to"
  assert f"{told} 0.037\n" in made.as_text()
  assert "private metrics" not in forecast_lib.forecast(plan()).as_text()


def test_alternatives_cost_the_same():
  made = forecast_lib.forecast(
    plan(noise_multiplier=None, target_epsilon=2.0),
    model=forecast_lib.ModelCost(num_parameters=1000, sequence_length=16),
    constant_batches=[50, 10_000],
  )
  mine, small, full = made.alternatives
  assert mine.noise_multiplier == made.plan.noise_multiplier
  for row, size in ((small, 50), (full, 10_000)):
    releases = [Releases(30, size / N, row.noise_multiplier)]
    spent = accounting.epsilon(releases, DELTA).value
    assert 1.98 < spent <= 2.0
    assert row.flops == 6 * 1000 * 16 * 30 * size
  with pytest.raises(ValueError, match=r"--compare has 10001, .* 10,000"):
    forecast_lib.forecast(plan(), constant_batches=[10_001])


def test_alternatives_cost_what_the_plan_costs_whatever_the_budget():
  made = forecast_lib.forecast(plan(target_epsilon=0.1), constant_batches=[200])
  releases = [Releases(30, 200 / N, made.alternatives[1].noise_multiplier)]
  spent = accounting.epsilon(releases, DELTA).value
  assert 0.99 * made.epsilon.value < spent <= made.epsilon.value


def test_text_fits_a_terminal_and_json_is_json():
  made = forecast_lib.forecast(
    plan(target_epsilon=9.0),
    model=forecast_lib.ModelCost(
      num_parameters=335_000_000,
      sequence_length=512,
      memory={"parameters": 2**32},
    ),
    constant_batches=[5000],
  )
  assert all(len(line) <= 80 for line in made.as_text().splitlines())
  told = json.loads(made.as_json())
  assert told["epsilon"]["value"] == made.epsilon.value
  assert told["flops"] == 6 * 335e6 * 512 * 9000


@pytest.mark.parametrize("text", ["", "10", "a:b", "1:2:3:4", "1.5:10"])
def test_refuses_what_is_no_phase(text):
  with pytest.raises(ValueError, match=r"--phase=.* write SIZE:UNTIL"):
    forecast_lib.parse_phase(text)
