import itertools
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.privacy import schedule as schedule_lib
from dptrain.privacy.schedule import BatchSchedule
from dptrain.privacy.schedule import Phase

PAPER = BatchSchedule(
  [Phase(262_144, 1_048_576, 7_500), Phase(1_048_576, 1_048_576, 20_000)]
)


@st.composite
def schedules(draw):
  phases, until = [], 0
  for _ in range(draw(st.integers(1, 6))):
    until += draw(st.integers(1, 300) | st.integers(1, 30_000))
    start = draw(st.integers(1, 2_000_000))
    end = draw(st.just(start) | st.integers(1, 2_000_000))
    ramp = draw(st.sampled_from(["linear", "geometric"]))
    phases.append(Phase(start, end, until, ramp))
  return BatchSchedule(phases, max_distinct_sizes=draw(st.integers(12, 64)))


def spans(schedule):
  """(phase, index of its first update) pairs."""
  starts = [0, *(phase.until_step for phase in schedule.phases)]
  return zip(schedule.phases, starts, strict=False)


@given(schedules())
@settings(deadline=None)
def test_segments_cover_every_update_once(schedule):
  at = 0
  for segment in schedule.segments():
    assert segment.first_step == at
    assert segment.num_steps >= 1
    at += segment.num_steps
  assert at == schedule.num_steps == schedule.phases[-1].until_step
  for a, b in itertools.pairwise(schedule.segments()):
    assert a.expected_batch_size != b.expected_batch_size


@given(schedules())
@settings(deadline=None)
def test_distinct_sizes_stay_few(schedule):
  sizes = {segment.expected_batch_size for segment in schedule.segments()}
  assert len(sizes) <= schedule.max_distinct_sizes <= 64


@given(schedules())
@settings(deadline=None)
def test_each_phase_climbs_from_its_start_to_its_end(schedule):
  by_step = np.repeat(
    [segment.expected_batch_size for segment in schedule.segments()],
    [segment.num_steps for segment in schedule.segments()],
  )
  for phase, first in spans(schedule):
    sizes = by_step[first : phase.until_step]
    assert sizes[-1] == phase.end_size
    if len(sizes) > 1:
      assert sizes[0] == phase.start_size
    assert sizes.min() >= min(phase.start_size, phase.end_size)
    assert sizes.max() <= max(phase.start_size, phase.end_size)
    steps = np.diff(sizes) * np.sign(phase.end_size - phase.start_size)
    assert (steps >= 0).all()


@given(schedules(), st.data())
@settings(deadline=None)
def test_the_size_of_an_update_is_that_of_its_segment(schedule, data):
  segment = data.draw(st.sampled_from(schedule.segments()))
  last = segment.first_step + segment.num_steps - 1
  for step in (
    segment.first_step,
    last,
    data.draw(st.integers(segment.first_step, last)),
  ):
    size = schedule.expected_batch_size(step)
    assert size == segment.expected_batch_size
    assert type(size) is int


def test_the_schedule_of_the_paper():
  # 262,144 to 1,048,576 over the first 7,500 of 20,000 updates.
  segments = PAPER.segments()
  assert PAPER.num_steps == 20_000
  assert 32 <= len({segment.expected_batch_size for segment in segments}) <= 64
  assert segments[0].expected_batch_size == 262_144
  assert PAPER.expected_batch_size(7_499) == 1_048_576
  assert segments[-1].first_step < 7_500
  # The ramp is straight: its mean is that of its ends, and it rises evenly.
  climb = [PAPER.expected_batch_size(step) for step in range(0, 7_500, 25)]
  assert np.mean(climb) == pytest.approx((262_144 + 1_048_576) / 2, rel=0.01)
  rises = np.diff([segment.expected_batch_size for segment in segments])
  assert rises.max() - rises.min() <= 1
  lengths = [segment.num_steps for segment in segments[:-1]]
  assert max(lengths) - min(lengths) <= 1


def test_a_geometric_ramp_rises_by_equal_ratios():
  schedule = BatchSchedule([Phase(1_000, 1_000_000, 700, "geometric")], 7)
  sizes = [segment.expected_batch_size for segment in schedule.segments()]
  assert sizes[0] == 1_000
  assert sizes[-1] == 1_000_000
  np.testing.assert_allclose(np.diff(np.log(sizes)), math.log(10) / 2, 1e-3)
  assert {segment.num_steps for segment in schedule.segments()} == {100}


def test_phases_of_equal_size_are_one_segment():
  schedule = BatchSchedule([Phase(8, 8, step) for step in range(1, 200)])
  assert schedule.segments() == ((0, 199, 8),)


def test_a_ramp_of_one_update_takes_its_end():
  schedule = BatchSchedule([Phase(4, 4, 3), Phase(4, 9, 4)])
  assert schedule.segments() == ((0, 3, 4), (3, 1, 9))


def test_a_ramp_shorter_than_its_levels_takes_one_size_per_update():
  schedule = BatchSchedule([Phase(1, 5, 5)])
  assert [s.expected_batch_size for s in schedule.segments()] == [1, 2, 3, 4, 5]


def test_constant():
  assert schedule_lib.constant(32, 10).segments() == ((0, 10, 32),)


def test_whole_floats_become_integers():
  schedule = BatchSchedule([Phase(256.0, 1e6, np.float64(2e4))])
  assert schedule == BatchSchedule([Phase(256, 1_000_000, 20_000)])
  assert type(schedule.num_steps) is int
  for value in itertools.chain(*schedule.segments()):
    assert type(value) is int


def test_a_list_of_phases_is_kept_unchangeable():
  phases = [Phase(8, 8, 5)]
  schedule = BatchSchedule(phases)
  phases.append(Phase(9, 9, 6))
  assert schedule.num_steps == 5
  assert hash(schedule) == hash(BatchSchedule((Phase(8, 8, 5),)))


@pytest.mark.parametrize("name", ["start_size", "end_size", "until_step"])
@pytest.mark.parametrize(
  "value", [0, -3, 2.5, math.inf, math.nan, "8", None], ids=repr
)
def test_refuses_what_is_not_a_whole_number(name, value):
  fields = {"start_size": 4, "end_size": 8, "until_step": 5, name: value}
  with pytest.raises(ValueError, match=rf"Phase\.{name}=.* whole number >= 1"):
    Phase(**fields)


def test_refuses_an_unknown_ramp():
  with pytest.raises(ValueError, match=r"Phase\.ramp='cubic'.*'geometric'"):
    Phase(4, 8, 5, "cubic")


def test_refuses_no_phases():
  with pytest.raises(ValueError, match=r"phases is empty; give at least one"):
    BatchSchedule([])


@pytest.mark.parametrize("value", [0, -1, 65, 3.5])
def test_refuses_a_bad_number_of_sizes(value):
  with pytest.raises(ValueError, match=rf"sizes={value} must be .* in 1\.\.64"):
    BatchSchedule([Phase(4, 4, 5)], max_distinct_sizes=value)


@pytest.mark.parametrize("ends", [(5, 5), (5, 3), (5, 9, 7)])
def test_refuses_phases_that_go_back_in_time(ends):
  with pytest.raises(ValueError, match="must be larger than the one before"):
    BatchSchedule([Phase(4, 4, end) for end in ends])


def test_refuses_too_few_sizes_for_a_ramp():
  told = r"sizes=2 is too small for 2 phases, .* set it to 3 or more"
  with pytest.raises(ValueError, match=told):
    BatchSchedule([Phase(4, 8, 5), Phase(8, 8, 9)], max_distinct_sizes=2)
  BatchSchedule([Phase(4, 8, 5), Phase(8, 8, 9)], max_distinct_sizes=3)


def test_refuses_too_many_constant_phases():
  with pytest.raises(ValueError, match=r"take 65 distinct sizes.* allows 64"):
    BatchSchedule([Phase(n, n, n) for n in range(1, 66)])


@pytest.mark.parametrize("step", [-1, 20_000])
def test_refuses_updates_outside_the_run(step):
  with pytest.raises(IndexError, match=rf"step={step} lies outside 0..19999"):
    PAPER.expected_batch_size(step)
