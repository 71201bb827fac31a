"""What stands behind one epsilon: its growth, its trade-offs, its groups.

All numbers are dp-accounting's, as in `accounting`; these take longer and are
made when somebody asks for the report as a page.
"""

from collections.abc import Sequence
import dataclasses
import math

import dp_accounting
from dp_accounting import pld
from dp_accounting import rdp
import numpy as np

from dptrain.privacy import accounting
from dptrain.privacy import mechanisms

GROUP_SIZES = (2, 4, 8, 16)
_MAX_POINTS = 24
_NUM_EPSILONS = 61
_MAX_MECHANISMS = 4


@dataclasses.dataclass(frozen=True)
class Growth:
  """Epsilon after some of the updates, at one delta.

  Attributes:
    updates: how many updates were made.
    by_rdp: bound by RDP then; empty where dp-accounting has none.
    by_pld: bound by PLD then.
    unamplified: as if every update had read every record.
  """

  updates: list[int]
  by_rdp: list[float]
  by_pld: list[float]
  unamplified: list[float]


@dataclasses.dataclass(frozen=True)
class TradeOff:
  """All guarantees that the same releases give at once.

  Attributes:
    epsilons: rising.
    deltas: the smallest delta that PLD gives for each.
    type_1: false alarms of whoever tests for one record's presence.
    type_2: misses that they must then accept at least (f-DP, arXiv
      1905.02383).
  """

  epsilons: list[float]
  deltas: list[float]
  type_1: list[float]
  type_2: list[float]


def growth(
  releases: Sequence[accounting.Releases],
  delta: float,
  relation: str,
  others: Sequence[accounting.Releases] = (),
) -> Growth:
  """Epsilon over the updates, which are made in the order of `releases`.

  By RDP it is what is quoted at the end, and an upper bound, some per cent
  above what more orders would give, before.

  Args:
    releases: runs of equal releases, in order of time; not empty.
    delta: of all values.
    relation: a key of `accounting.RELATIONS`.
    others: what was released before the first update.
  """
  everything = [*others, *releases]
  neighbouring = accounting.RELATIONS[relation]
  orders = set(accounting.FEW_RDP_ORDERS)
  has_rdp = accounting.has_rdp(everything, relation)
  if has_rdp:
    together = accounting.merged(everything)
    orders |= set(accounting.near_orders(together, delta, relation))
  renyi = rdp.RdpAccountant(sorted(orders), neighbouring)
  losses = _by_pld(everything, delta, relation)
  made = Growth([], [], [], [])
  before = list(others)
  safe = accounting.delta_for_pld(everything, delta)
  if others:
    event = accounting.event(others)
    losses.compose(event)
    if has_rdp:
      renyi.compose(event)
  for part in _pieces(releases):
    event = accounting.event([part])
    if has_rdp:
      with accounting.without_order_warnings():
        renyi.compose(event)
      made.by_rdp.append(float(renyi.get_epsilon(delta)))
    losses.compose(event)
    before.append(part)
    made.updates.append(sum(r.count for r in before[len(others) :]))
    made.by_pld.append(float(losses.get_epsilon(safe)))
    made.unamplified.append(
      accounting.epsilon_without_amplification(before, delta, relation)
    )
  return made


def trade_off(
  releases: Sequence[accounting.Releases],
  epsilon: float,
  delta: float,
  relation: str,
  *,
  failure_prob: float = 0.0,
) -> TradeOff:
  """Delta over epsilon, and errors of type I against errors of type II.

  Args:
    releases: everything released; not empty.
    epsilon: the quoted one; the curve reaches to twice that.
    delta: at which it is quoted.
    relation: a key of `accounting.RELATIONS`.
    failure_prob: what of each delta pays for failures (`privacy.others`).
  """
  losses = _by_pld(releases, delta, relation)
  losses.compose(accounting.event(releases))
  epsilons = np.linspace(0.0, 2 * epsilon, _NUM_EPSILONS)
  deltas = np.array([float(losses.get_delta(float(e))) for e in epsilons])
  deltas += accounting.pld_error(releases) + failure_prob
  deltas = np.minimum(deltas, 1.0)
  alarms = np.concatenate(
    [np.geomspace(1e-4, 0.1, 40), np.linspace(0.1, 1, 50)]
  )
  # Proposition 6 of arXiv 1905.02383: each (epsilon, delta) allows no test
  # below two straight lines.
  lines = np.maximum(
    1 - deltas[:, None] - np.exp(epsilons)[:, None] * alarms,
    np.exp(-epsilons)[:, None] * (1 - deltas[:, None] - alarms),
  )
  misses = np.maximum(lines.max(axis=0), 0.0)
  return TradeOff(
    epsilons.tolist(), deltas.tolist(), alarms.tolist(), misses.tolist()
  )


def prices_groups(
  releases: Sequence[accounting.Releases], relation: str
) -> bool:
  """Whether `group_epsilons` has a bound for these releases."""
  return relation != "replace_one" and all(
    release.sampling == "poisson" for release in releases
  )


def covering_gaussian(
  releases: Sequence[accounting.Releases],
  epsilon: float,
  delta: float,
  relation: str,
  *,
  failure_prob: float = 0.0,
) -> float:
  """Epsilon, at `delta`, of a Gaussian mechanism that covers the releases.

  Covers: its delta is no smaller than theirs at every epsilon from 0 to the
  quoted one. So whoever refutes that Gaussian refutes the quoted guarantee, up
  to what happens with a probability below `delta`.

  Args:
    releases: everything released; not empty.
    epsilon: the quoted one.
    delta: at which it is quoted.
    relation: a key of `accounting.RELATIONS`.
    failure_prob: as in `trade_off`.

  Returns:
    At least `epsilon`: usually that itself. Infinity where PLD does not tell
    the deltas.
  """
  if not epsilon:
    return epsilon
  if epsilon > accounting.MAX_EPSILON_FOR_PLD or not accounting.has_pld(
    releases, relation
  ):
    return math.inf
  curve = trade_off(
    releases, epsilon, delta, relation, failure_prob=failure_prob
  )
  sigma = dp_accounting.get_sigma_gaussian(epsilon, delta)
  for at, least in zip(curve.epsilons, curve.deltas, strict=True):
    # Near the quoted epsilon two upper bounds of one thing differ a little.
    if at < 0.99 * epsilon and delta < least < 1:
      sigma = min(sigma, dp_accounting.get_sigma_gaussian(at, least))
  return max(epsilon, float(dp_accounting.get_epsilon_gaussian(sigma, delta)))


def group_epsilons(
  releases: Sequence[accounting.Releases],
  delta: float,
  relation: str,
  sizes: Sequence[int] = GROUP_SIZES,
) -> dict[int, float | None]:
  """Epsilon for groups of units that change together, at the same delta.

  Of a group of k, Binomial(k, q) units are in a sample, and each moves the sum
  by at most the sensitivity: a mixture of Gaussians (arXiv 2401.10294). Upper
  bounds, coarser than the quoted epsilon: sampling probabilities are rounded up
  to a few, and the grid grows with k.

  Args:
    releases: everything released, for which `prices_groups`.
    delta: of all values.
    relation: a key of `accounting.RELATIONS`.
    sizes: of groups, rising.

  Returns:
    Epsilon by size of the group; None where it exceeds
    `accounting.MAX_EPSILON_FOR_PLD`.
  """
  few = _rounded_up(releases)
  safe = accounting.delta_for_pld(releases, delta)
  found: dict[int, float | None] = {}
  for size in sizes:
    if None in found.values():
      found[size] = None  # larger groups cost more
      continue
    losses = _by_pld(few, delta, relation, size)
    for release in few:
      losses.compose(
        mechanisms.group_event(release, size * release.group_size),
        release.count,
      )
    value = float(losses.get_epsilon(safe))
    limit = accounting.MAX_EPSILON_FOR_PLD
    found[size] = value if value <= limit else None
  return found


def _by_pld(
  releases: Sequence[accounting.Releases],
  delta: float,
  relation: str,
  coarser: int = 1,
) -> pld.PLDAccountant:
  """An empty accountant on a grid that fits the releases."""
  grid = accounting.pld_interval(
    tuple(accounting.merged(releases)), delta, relation, quick=True
  )
  return pld.PLDAccountant(accounting.RELATIONS[relation], coarser * grid)


def _rounded_up(
  releases: Sequence[accounting.Releases],
) -> list[accounting.Releases]:
  """At most `_MAX_MECHANISMS` kinds per noise, none cheaper than what it is."""
  by_noise: dict[float, list[accounting.Releases]] = {}
  for release in accounting.merged(releases):
    by_noise.setdefault(release.noise_multiplier, []).append(release)
  few = []
  for same in by_noise.values():
    same.sort(key=lambda r: r.sampling_prob)
    for part in np.array_split(np.arange(len(same)), _MAX_MECHANISMS):
      if len(part):
        few.append(
          dataclasses.replace(
            same[part[-1]], count=sum(same[i].count for i in part)
          )
        )
  return few


def _pieces(
  releases: Sequence[accounting.Releases],
) -> list[accounting.Releases]:
  """Cuts long runs, so that a curve has some points."""
  total = sum(r.count for r in releases)
  # Where there are many runs, each gives a point.
  points = max(_MAX_POINTS - len(releases), _MAX_POINTS // 4)
  length = max(1, -(-total // points))
  pieces = []
  for release in releases:
    left = release.count
    while left:
      count = min(length, left)
      pieces.append(dataclasses.replace(release, count=count))
      left -= count
  return pieces
