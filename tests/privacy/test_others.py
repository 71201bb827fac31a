"""Releases beside the updates: written once, and part of every price."""

import json

import pytest

from dptrain.privacy import accounting
from dptrain.privacy import budget
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.privacy.accounting import Releases

VOCABULARY = others.OtherRelease("the vocabulary", "abc", 5.0, 4e-7)
DELTA = 1e-6


def settings(**changes):
  fields = {
    "schedule": schedule.constant(50, 20),
    "delta": DELTA,
    "target_epsilon": 2.0,
  }
  return plan_lib.PrivacySettings(**(fields | changes))


@pytest.fixture
def plan():
  return plan_lib.make_plan(settings(noise_multiplier=1.3), 1000)


def start(ledger, plan):
  ledger.start(plan, corpus="c", seed="s", fixed_seed=False)
  return ledger.open_branch(
    checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
  ).name


def test_one_line_however_often_it_is_recorded(plan, tmp_path):
  for _ in range(2):
    with ledger_lib.opened(tmp_path) as ledger:
      start(ledger, plan)
      ledger.record_other(VOCABULARY)
      ledger.record_other(VOCABULARY)
  read = ledger_lib.read(tmp_path)
  assert read.others == (VOCABULARY,)
  lines = (tmp_path / ledger_lib.LEDGER_FILE).read_text().splitlines()
  found = [json.loads(line) for line in lines]
  (told,) = [line for line in found if line["kind"] == "other"]
  assert told["noise_multiplier"] == 5.0
  assert told["failure_prob"] == 4e-7


def test_it_is_part_of_what_was_released(plan, tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    branch = start(ledger, plan)
    before = ledger.releases()
    ledger.record_other(VOCABULARY)
    ledger.record_other(VOCABULARY._replace(name="another"))
    ledger.record(branch, 0, plan.release(0))
    assert before == []
    assert ledger.releases() == [Releases(2, 1.0, 5.0), Releases(1, 0.05, 1.3)]
    assert ledger.releases(without=branch) == [Releases(2, 1.0, 5.0)]
    assert ledger.update_releases() == [Releases(1, 0.05, 1.3)]
    assert ledger.delta_left(DELTA) == pytest.approx(2e-7)
    with pytest.raises(ValueError, match=r"delta=5e-07 is used up by"):
      ledger.delta_left(5e-7)


def test_a_ledger_without_others_has_all_of_delta(plan, tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger, plan)
    assert ledger.delta_left(DELTA) == DELTA


def test_the_noise_is_calibrated_to_what_is_left():
  made = plan_lib.make_plan(settings(), 1000, others=[VOCABULARY])
  alone = plan_lib.make_plan(settings(), 1000)
  assert made.noise_multiplier > alone.noise_multiplier

  def cost(noise):
    return accounting.epsilon(
      [Releases(1, 1.0, 5.0), Releases(20, 0.05, noise)], 6e-7
    ).value

  assert cost(made.noise_multiplier) <= 2.0
  assert cost(made.noise_multiplier - 2e-4) > 2.0


@pytest.mark.parametrize(
  ("other", "changes", "message"),
  [
    (
      VOCABULARY._replace(noise_multiplier=1.0),
      {},
      "target_epsilon=2 is spent",
    ),
    (VOCABULARY._replace(failure_prob=1e-6), {}, "delta=1e-06 is used up"),
    (VOCABULARY, {"delta": 1e-7, "noise_multiplier": 1.0}, "delta=1e-07 is us"),
  ],
)
def test_nothing_is_left(other, changes, message):
  with pytest.raises(ValueError, match=message):
    plan_lib.make_plan(settings(**changes), 1000, others=[other])


def test_the_budget_stops_earlier(tmp_path):
  plan = plan_lib.make_plan(settings(), 1000)
  with ledger_lib.opened(tmp_path) as ledger:
    branch = start(ledger, plan)
    assert budget.last_affordable(plan, ledger, branch, 0) == 20
    ledger.record_other(VOCABULARY)
    limit = budget.last_affordable(plan, ledger, branch, 0)

  def cost(updates):
    releases = [Releases(1, 1.0, 5.0), *plan.releases(0, updates)]
    return accounting.epsilon(releases, DELTA - 4e-7).value

  assert 0 < limit < 20
  assert cost(limit) <= 2.0 < cost(limit + 1)
