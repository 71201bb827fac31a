"""What was spent so far, while training goes on."""

import time

from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import teachers


class EpsilonMeter:
  """Epsilon spent, computed in no more than a twentieth of the time."""

  def __init__(self, delta: float, relation: str):
    self._delta, self._relation = delta, relation
    self._cost, self._at = 0.0, -float("inf")

  def __call__(self, ledger: ledger_lib.Ledger, now: bool) -> float | None:
    """What `ledger` costs, with those that its run has learned from.

    None if it is too early to ask, unless `now`.

    By a coarse grid, unless `now`: then what the report will say.
    """
    begin = time.monotonic()
    if not now and begin - self._at < 20 * self._cost:
      return None
    value = teachers.composed_epsilon(
      ledger.sources(teachers.shard_part(ledger.header.get("shard"))),
      self._delta,
      self._relation,
      quick=not now,
    ).value
    self._at = time.monotonic()
    self._cost = self._at - begin
    return value
