"""Batch-size schedules: how many examples each update expects.

Large-Scale Differentially Private BERT (arXiv 2108.01624) raises the batch
during training, because the signal-to-noise ratio of the gradient falls. The
accountant prices each distinct sampling probability separately, so a schedule
takes few distinct sizes: what is quantised here is what is sampled, noised and
priced.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

MAX_DISTINCT_SIZES = 64


class Segment(NamedTuple):
  """A run of consecutive updates that expect the same batch.

  Attributes:
    first_step: index of its first update, counted from 0.
    num_steps: how many updates it lasts.
    expected_batch_size: examples expected in each of them.
  """

  first_step: int
  num_steps: int
  expected_batch_size: int


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of the schedule that ends before update `until_step`.

  Attributes:
    start_size: expected batch size of its first update.
    end_size: expected batch size of its last update; equal to `start_size` for
      a constant phase.
    until_step: the first update that is no longer in this phase.
    ramp: "linear" (equal increments) or "geometric" (equal ratios).
  """

  start_size: int
  end_size: int
  until_step: int
  ramp: str = "linear"

  def __post_init__(self) -> None:
    for name in ("start_size", "end_size", "until_step"):
      value = getattr(self, name)
      if (
        not isinstance(value, int | float | np.integer | np.floating)
        or not 1 <= value < math.inf
        or int(value) != value
      ):
        raise ValueError(f"Phase.{name}={value!r} must be a whole number >= 1.")
      object.__setattr__(self, name, int(value))  # 1e6 is welcome
    if self.ramp not in ("linear", "geometric"):
      raise ValueError(
        f"Phase.ramp={self.ramp!r} is unknown; use 'linear' or 'geometric'."
      )


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
  """Expected batch size by update, in phases (arXiv 2108.01624).

  A ramp is climbed in equal steps of time; together the phases take at most
  `max_distinct_sizes` different sizes.

  >>> schedule = BatchSchedule([Phase(256, 1024, 30), Phase(1024, 1024, 40)],
  ...                          max_distinct_sizes=4)
  >>> [tuple(segment) for segment in schedule.segments()]
  [(0, 10, 256), (10, 10, 640), (20, 20, 1024)]
  >>> schedule.expected_batch_size(15)
  640

  Attributes:
    phases: in order of time; the last one's `until_step` is the number of
      updates of the whole run.
    max_distinct_sizes: at most 64, so that accounting stays quick.
  """

  phases: Sequence[Phase]
  max_distinct_sizes: int = MAX_DISTINCT_SIZES

  def __post_init__(self) -> None:
    object.__setattr__(self, "phases", tuple(self.phases))
    if not self.phases:
      raise ValueError(
        "BatchSchedule.phases is empty; give at least one Phase."
      )
    if self.max_distinct_sizes not in range(1, MAX_DISTINCT_SIZES + 1):
      raise ValueError(
        f"BatchSchedule.max_distinct_sizes={self.max_distinct_sizes} must be a"
        f" whole number in 1..{MAX_DISTINCT_SIZES}."
      )
    object.__setattr__(self, "max_distinct_sizes", int(self.max_distinct_sizes))
    ends = [0, *(phase.until_step for phase in self.phases)]
    if any(a >= b for a, b in itertools.pairwise(ends)):
      raise ValueError(
        f"BatchSchedule.phases end at updates {ends[1:]}; each until_step must"
        " be larger than the one before it."
      )
    if self._levels_of_a_ramp() < 2 and self._num_ramps():
      raise ValueError(
        f"BatchSchedule.max_distinct_sizes={self.max_distinct_sizes} is too"
        f" small for {len(self.phases)} phases, of which {self._num_ramps()}"
        " are ramps, of two sizes at least: set it to"
        f" {len(self.phases) + self._num_ramps()} or more, or merge phases."
      )
    sizes = {segment.expected_batch_size for segment in self.segments()}
    if len(sizes) > self.max_distinct_sizes:
      raise ValueError(
        f"BatchSchedule.phases take {len(sizes)} distinct sizes; accounting"
        f" allows {self.max_distinct_sizes}: use fewer phases or equal sizes."
      )

  @property
  def num_steps(self) -> int:
    """Updates in the whole run."""
    return self.phases[-1].until_step

  def expected_batch_size(self, step: int) -> int:
    """Expected batch size of update `step`, counted from 0."""
    if not 0 <= step < self.num_steps:
      raise IndexError(f"step={step} lies outside 0..{self.num_steps - 1}.")
    for segment in self.segments():
      if step < segment.first_step + segment.num_steps:
        return segment.expected_batch_size
    raise AssertionError("segments cover every step")

  def segments(self) -> tuple[Segment, ...]:
    """The whole schedule as runs of equal size, neighbours merged."""
    merged: list[Segment] = []
    for segment in self._pieces():
      if merged and merged[-1].expected_batch_size == segment[2]:
        last = merged.pop()
        segment = Segment(last[0], last[1] + segment[1], last[2])
      merged.append(segment)
    return tuple(merged)

  def _num_ramps(self) -> int:
    return sum(p.start_size != p.end_size for p in self.phases)

  def _levels_of_a_ramp(self) -> int:
    ramps = self._num_ramps()
    constants = len(self.phases) - ramps
    return (self.max_distinct_sizes - constants) // max(ramps, 1)

  def _pieces(self) -> Iterator[Segment]:
    first = 0
    for phase in self.phases:
      steps = phase.until_step - first
      levels = 1
      if phase.start_size != phase.end_size:
        levels = min(self._levels_of_a_ramp(), steps)
      # A one-update ramp has no room to climb: it takes its end size.
      space = np.geomspace if phase.ramp == "geometric" else np.linspace
      sizes = space(phase.start_size, phase.end_size, levels)
      if levels == 1:
        sizes = np.asarray([phase.end_size])
      edges = np.linspace(0, steps, levels + 1).round().astype(int)
      for size, (a, b) in zip(
        sizes.round().astype(int), itertools.pairwise(edges), strict=True
      ):
        yield Segment(first + int(a), int(b - a), int(size))
      first = phase.until_step


def constant(size: int, num_steps: int) -> BatchSchedule:
  """A schedule that expects `size` examples at each of `num_steps` updates."""
  return BatchSchedule((Phase(size, size, num_steps),))
