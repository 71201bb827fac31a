"""Branches: what names a line of training, and when it repeats itself."""

from collections.abc import Sequence
import hashlib
from typing import NamedTuple


class Branch(NamedTuple):
  """One line of training.

  Attributes:
    name: digest that keys are bound to.
    parent: name of the branch it forked off; empty for a root.
    fork_step: number of updates that it shares with its parent.
    lineage: digest of plan, data, programs and code.
    environment: what may change rounding only: devices, versions.
  """

  name: str
  parent: str
  fork_step: int
  lineage: str
  environment: str


def name_of(*parts: str) -> str:
  """A digest of all that decides a branch's gradients."""
  return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def repeats_exactly(
  history: Sequence[tuple[int, str]],
  last_step: int,
  step: int,
  environment: str,
) -> bool:
  """Whether going on from `step` makes what was made already to the same bit.

  Only updates that were already made can be made twice: from `step` on, all of
  them must have been made in this same environment.

  Args:
    history: (first update, environment), in order.
    last_step: the branch's last update; -1 if it has none.
    step: where it would go on.
    environment: of now.
  """
  ends = [start for start, _ in history[1:]] + [last_step + 1]
  return all(
    made_in == environment
    for (start, made_in), end in zip(history, ends, strict=True)
    if max(start, step) < end
  )
