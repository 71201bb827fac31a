import dataclasses
import json
import math
import warnings

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import plan as plan_lib
from dptrain.privacy.accounting import Releases
from dptrain.privacy.plan import PrivacySettings
from dptrain.privacy.plan import make_plan
from dptrain.privacy.schedule import BatchSchedule
from dptrain.privacy.schedule import Phase
from dptrain.privacy.schedule import constant

SCHEDULE = BatchSchedule([Phase(10, 40, 30), Phase(40, 40, 50)], 4)


def make(num_examples=1000, *, calibrated_noise=None, **changes):
  fields = {"schedule": SCHEDULE, "delta": 1e-6, "noise_multiplier": 1.1}
  return make_plan(
    PrivacySettings(**(fields | changes)),
    num_examples,
    calibrated_noise=calibrated_noise,
  )


@given(
  start=st.integers(1, 500),
  end=st.integers(1, 500),
  steps=st.integers(1, 120),
  first=st.integers(0, 150),
  num_examples=st.integers(500, 10_000),
)
@settings(deadline=None, max_examples=50)
def test_sampler_accountant_and_noise_read_the_same_numbers(
  start, end, steps, first, num_examples
):
  schedule = BatchSchedule([Phase(start, end, steps), Phase(7, 7, steps + 9)])
  plan = make(num_examples, schedule=schedule)
  by_step = [plan.release(step) for step in range(plan.num_steps)]
  in_runs = [
    Releases(1, run.sampling_prob, run.noise_multiplier)
    for run in plan.releases(first)
    for _ in range(run.count)
  ]
  assert in_runs == by_step[first:]
  assert all(run.count > 0 for run in plan.releases(first))
  for step in (0, steps - 1, plan.num_steps - 1):
    size = plan.expected_batch_size(step)
    assert size == schedule.expected_batch_size(step)
    assert plan.sampling_prob(step) == size / num_examples
    assert by_step[step] == Releases(1, size / num_examples, 1.1)


def test_a_plan_keeps_every_setting():
  chosen = PrivacySettings(
    schedule=SCHEDULE,
    delta=2e-6,
    noise_multiplier=3,
    target_epsilon=7.0,
    l2_clip_norm=0.5,
    clipping="automatic",
    automatic_gamma=0.02,
    private_metrics_share=0.1,
    relation="zero_out",
  )
  plan = make_plan(chosen, 1000)
  for field in dataclasses.fields(chosen):
    assert getattr(plan, field.name) == getattr(chosen, field.name)
  assert plan.num_examples == 1000
  assert type(plan.noise_multiplier) is float


def test_plain_data_survives_json():
  data = make().as_dict()
  back = json.loads(json.dumps(data))
  assert plan_lib.differences(json.loads(json.dumps(data)), back) == []
  assert back["schedule"]["phases"][0]["end_size"] == 40
  assert back["noise_multiplier"] == 1.1
  assert set(back) == {field.name for field in dataclasses.fields(make())}


def test_a_phase_larger_than_the_corpus_is_refused_by_name():
  schedule = BatchSchedule([Phase(10, 10, 5), Phase(1001, 1001, 9)])
  with pytest.raises(
    ValueError,
    match=r"size=1001 from update 5 on exceeds the corpus of 1000 .*Lower that",
  ):
    make(schedule=schedule)
  assert make(1001, schedule=schedule).sampling_prob(5) == 1.0


def test_an_empty_corpus_is_refused():
  with pytest.raises(ValueError, match="num_examples=0: the corpus is empty"):
    make(0)


def test_a_delta_that_allows_publishing_records_is_told():
  for delta in (1e-3, 0.1):
    with pytest.warns(UserWarning, match=r"not below 1/N=0.001.*smaller delta"):
      make(1000, delta=delta)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    make(1000, delta=0.99e-3)


@pytest.mark.parametrize(
  "name",
  [
    "noise_multiplier",
    "target_epsilon",
    "l2_clip_norm",
    "automatic_gamma",
    "private_metrics_max_loss",
    "private_metrics_max_norm",
  ],
)
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_refuses_what_is_not_positive(name, value):
  with pytest.raises(
    ValueError, match=rf"{name}={value} must be a positive, finite number"
  ):
    make(**{name: value})


@pytest.mark.parametrize("name", ["l2_clip_norm", "automatic_gamma"])
def test_refuses_norms_that_float32_cannot_tell(name):
  with pytest.raises(
    ValueError, match=rf"{name}=1e-11 is below 1e-10, .*scale the loss up"
  ):
    make(**{name: 1e-11})
  make(**{name: 1e-10})


@pytest.mark.parametrize(
  "name",
  ["adaptive_quantile", "adaptive_budget_share", "private_metrics_share"],
)
@pytest.mark.parametrize("value", [0, 1, -0.5, math.inf, math.nan])
def test_refuses_what_is_no_share_of_adaptation(name, value):
  with pytest.raises(
    ValueError, match=rf"{name}={value} must be between 0 and 1"
  ):
    make(**{name: value})


@pytest.mark.parametrize("value", [0, -0.2, math.inf, math.nan])
def test_refuses_a_clip_norm_that_does_not_move(value):
  with pytest.raises(
    ValueError, match=rf"adaptive_learning_rate={value} must be a positive"
  ):
    make(adaptive_learning_rate=value)


def test_automatic_clipping_cannot_adapt():
  with pytest.raises(
    ValueError,
    match=r"adaptive_quantile=0\.5 needs .*use 'flat' or 'normalized'",
  ):
    make(adaptive_quantile=0.5, clipping="automatic")


def test_adaptation_is_in_the_plan_and_costs_nothing_more():
  adapting = make(adaptive_quantile=0.5, adaptive_budget_share=0.3)
  assert list(adapting.releases()) == list(make().releases())
  told = plan_lib.differences(make().as_dict(), adapting.as_dict())
  assert told == [
    "adaptive_budget_share was 0.01 and is now 0.3",
    "adaptive_quantile was None and is now 0.5",
  ]


def test_private_metrics_are_in_the_plan_and_cost_nothing_more():
  told = make(private_metrics_share=0.05, private_metrics_max_loss=7)
  assert list(told.releases()) == list(make().releases())
  assert plan_lib.differences(make().as_dict(), told.as_dict()) == [
    "private_metrics_max_loss was None and is now 7",
    "private_metrics_max_norm was None and is now 10.0",
    "private_metrics_share was None and is now 0.05",
  ]


def test_without_private_metrics_a_plan_is_that_of_before_there_were_any():
  plan = make(private_metrics_max_loss=7).as_dict()
  older = {k: v for k, v in plan.items() if not k.startswith("private_metrics")}
  assert plan_lib.differences(older, plan) == []
  assert plan_lib.metric_ranges(older) == plan_lib.metric_ranges(plan) == {}


def test_what_is_released_of_metrics():
  plan = make(private_metrics_share=0.05, private_metrics_max_norm=3.0)
  assert plan_lib.metric_ranges(plan.as_dict()) == {
    "loss": 12.0,
    "accuracy": 1.0,
    "clip_fraction": 1.0,
    "gradient_norm": 3.0,
  }
  plan = make(private_metrics_share=0.05, clipping="automatic")
  assert "clip_fraction" not in plan_lib.metric_ranges(plan.as_dict())


def test_shares_that_leave_the_gradients_nothing_are_refused():
  shares = {"adaptive_budget_share": 0.4, "private_metrics_share": 0.6}
  make(**shares)  # the clip norm is fixed: only one of them counts
  with pytest.raises(
    ValueError,
    match=r"adaptive_budget_share=0\.4 and private_metrics_share=0\.6 leave",
  ):
    make(**shares, adaptive_quantile=0.5)


@pytest.mark.parametrize("delta", [0, 1, -0.1, math.nan])
def test_refuses_what_is_no_delta(delta):
  with pytest.raises(ValueError, match=rf"delta={delta} must lie strictly"):
    make(delta=delta)


@pytest.mark.parametrize("name", ["clipping", "relation", "sampling", "unit"])
def test_refuses_what_is_not_supported(name):
  known = getattr(make(), name)
  with pytest.raises(
    ValueError,
    match=rf"{name}='other' is not (supported|known); use one of .*'{known}",
  ):
    make(**{name: "other"})


def test_noise_or_a_budget_must_be_given():
  with pytest.raises(ValueError, match="give a noise multiplier, a budget, or"):
    make(noise_multiplier=None)


def test_calibrated_noise_keeps_the_whole_schedule_within_the_budget(
  monkeypatch,
):
  monkeypatch.setattr(accounting, "_INTERVALS", (1e-3,))  # quicker
  schedule = BatchSchedule([Phase(10, 10, 20), Phase(40, 40, 50)])
  plan = make(schedule=schedule, noise_multiplier=None, target_epsilon=3.0)
  spent = accounting.epsilon(list(plan.releases()), 1e-6).value
  assert 0.99 * 3.0 < spent <= 3.0


def test_an_unreachable_budget_is_refused():
  with pytest.raises(ValueError, match="no noise multiplier"):
    make(
      10, schedule=constant(10, 99), noise_multiplier=None, target_epsilon=1e-6
    )


def test_an_earlier_calibration_is_read_only_without_given_noise(monkeypatch):
  def never(*_):
    raise AssertionError("calibrated again")

  monkeypatch.setattr(calibration, "noise_multiplier", never)
  resumed = make(
    noise_multiplier=None, target_epsilon=3.0, calibrated_noise=0.77
  )
  assert resumed.noise_multiplier == 0.77
  given_too = make(target_epsilon=3.0, calibrated_noise=0.77)
  assert given_too.noise_multiplier == 1.1


def test_differences_name_the_fields():
  before = make().as_dict()
  now = make(900, l2_clip_norm=0.5).as_dict()
  assert plan_lib.differences(before, before) == []
  assert plan_lib.differences(before, now) == [
    "l2_clip_norm was 1.0 and is now 0.5",
    "num_examples was 1000 and is now 900",
  ]
  later = make(schedule=constant(10, 5)).as_dict()
  (only,) = plan_lib.differences(before, later)
  assert only.startswith("schedule was ")
  assert plan_lib.differences({"old": 1}, {"new": 2}) == [
    "new was None and is now 2",
    "old was 1 and is now None",
  ]


def test_a_plan_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().noise_multiplier = 0.1


@pytest.mark.parametrize("ramp", ["linear", "geometric"])
def test_few_sizes_cost_what_a_size_of_its_own_for_each_update_would(ramp):
  steps, size, orders = 20_000, 346_000_000, (4, 5, 6, 8)
  made = make_plan(
    PrivacySettings(
      schedule=BatchSchedule([Phase(262_144, 1_048_576, steps, ramp)]),
      delta=2.89e-9,
      noise_multiplier=0.77,
    ),
    size,
  )
  few = made.releases()
  # What is priced is what is sampled, update by update.
  for step in range(0, steps, 97):
    [one] = [
      r for r in few if r.sampling_prob == made.expected_batch_size(step) / size
    ]
    assert one == dataclasses.replace(made.release(step), count=one.count)
  assert len(few) == 64
  assert sum(r.count for r in few) == steps
  space = np.linspace if ramp == "linear" else np.geomspace
  own = [
    Releases(1, int(batch) / size, 0.77)
    for batch in space(262_144, 1_048_576, steps).round()
  ]
  assert len(set(own)) == steps
  price = [
    accounting.rdp_bound(releases, 2.89e-9, "zero_out", orders)[0]
    for releases in (few, own)
  ]
  assert price[0] == pytest.approx(price[1], rel=0.01)
