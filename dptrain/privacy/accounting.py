"""What releases cost: epsilon, by dp-accounting and nothing else.

Every epsilon that dptrain prints comes out of this file, and every number in
this file comes out of dp-accounting. Both of its accountants give a valid upper
bound (RDP, arXiv 1702.07476; PLD, arXiv 2207.04380), so the smaller is quoted,
with its settings.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import logging
import math

import dp_accounting
from dp_accounting import pld
from dp_accounting import rdp

from dptrain.privacy import mechanisms

RELATIONS = mechanisms.RELATIONS
Releases = mechanisms.Releases
event = mechanisms.event
merged = mechanisms.merged

# Low orders decide at little noise, high ones at much.
RDP_ORDERS = tuple(
  [1 + x / 10.0 for x in range(1, 100)]
  + list(range(11, 64))
  + [80, 96, 128, 192, 256, 512, 1024, 2048, 4096]
)

# Enough to tell which noise to try first, and which orders.
FEW_RDP_ORDERS = (1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32, 63, 256, 1024)

# Grids of PLD. On one of width i, T updates cost some T i^2 / epsilon more than
# they should: half a per mille where i is `_GRID_SHARE` epsilon / sqrt(T).
_INTERVALS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_GRID_SHARE = 0.01
# Time grows with mechanisms / interval: many make do with a coarser grid.
_MANY_MECHANISMS, _COARSER = 8, 3.0
# Error of delta per update by PLD's Fourier transforms: a third of it was seen.
_PLD_ERROR = 2.0**-54
# Its memory grows with epsilon / interval, and nobody defends more than this.
MAX_EPSILON_FOR_PLD = 50.0

# Below it dp-accounting overflows to NaN; epsilon is beyond 1e200 anyway.
_SMALLEST_NOISE = 1e-100


@dataclasses.dataclass(frozen=True)
class Epsilon:
  """An upper bound on epsilon and how it was found.

  Attributes:
    value: the smallest of the valid bounds.
    accountant: whose bound that is: "PLD", "RDP", or "Gaussian", the closed
      form without amplification, where neither of the two could be had.
    settings: grid or order of that accountant, in words.
    rdp: the RDP bound; None where dp-accounting has none for the sampling.
    pld: the PLD bound; None when it was not computed.
    note: why a bound was not computed, or empty.
  """

  value: float
  accountant: str
  settings: str
  rdp: float | None
  pld: float | None
  note: str = ""

  def as_dict(self) -> dict[str, float | str | None]:
    """Plain data for JSON; an infinite bound becomes the string "inf"."""
    return {
      name: "inf" if value == math.inf else value
      for name, value in dataclasses.asdict(self).items()
    }


def epsilon(
  releases: Sequence[Releases],
  delta: float,
  relation: str = "zero_out",
  *,
  quick: bool = False,
) -> Epsilon:
  """Smallest valid bound on epsilon at `delta`.

  Formal guarantee: the composition of `releases` is (epsilon, delta)-DP under
  `relation`, provided that each was a Gaussian mechanism on a sample as stated;
  counts, probabilities, sizes and noise are public.

  Args:
    releases: what was, or will be, released.
    delta: in (0, 1).
    relation: a key of `RELATIONS`.
    quick: use the coarse PLD grid, for progress displays.

  Returns:
    The bound with its settings.

  Raises:
    ValueError: delta is out of range, or dp-accounting has no bound for these
      samplings under this relation.
  """
  check_delta(delta)
  for release in releases:
    mechanisms.check_priced(release.sampling, relation)
  composed = tuple(merged(releases))
  if not composed:
    return Epsilon(0.0, "RDP", "nothing released", 0.0, 0.0)
  return _bound(composed, delta, relation, quick)


# A run asks for the same bound when it starts, when it saves and at its end.
@functools.lru_cache(maxsize=64)
def _bound(
  composed: tuple[Releases, ...], delta: float, relation: str, quick: bool
) -> Epsilon:
  """`epsilon` of releases that are merged and not empty."""
  if _without_noise(composed):
    note = f"PLD not computed: noise below {_SMALLEST_NOISE:g} counts as none"
    return Epsilon(math.inf, "RDP", "no noise", math.inf, None, note)
  by_rdp, order = None, 0.0
  if has_rdp(composed, relation):
    by_rdp, order = best_rdp(composed, delta, relation)
  by_pld, interval, note = _pld_if_possible(
    composed, delta, relation, quick, by_rdp
  )
  if by_rdp is None and by_pld is None:
    # Recorded, and valid whatever was sampled.
    value = epsilon_without_amplification(composed, delta, relation)
    return Epsilon(value, "Gaussian", "no amplification", None, None, note)
  if by_pld is not None and (by_rdp is None or by_pld < by_rdp):
    if by_rdp is None:
      note = "RDP not computed: dp-accounting has none for this sampling"
    settings = f"discretisation interval {interval:g}"
    return Epsilon(by_pld, "PLD", settings, by_rdp, by_pld, note)
  if by_rdp is None:
    raise AssertionError("one of the two bounds was had")
  if by_rdp and order in (RDP_ORDERS[0], RDP_ORDERS[-1]):
    wider = "the best order of RDP is the last one tried; others may give less"
    note = f"{note}; {wider}" if note else wider
  return Epsilon(by_rdp, "RDP", f"order {order:g}", by_rdp, by_pld, note)


def _pld_if_possible(
  composed: tuple[Releases, ...],
  delta: float,
  relation: str,
  quick: bool,
  by_rdp: float | None,
) -> tuple[float | None, float, str]:
  """The PLD bound or None, its grid, and why there is none."""
  if not has_pld(composed, relation):
    if by_rdp is None:
      raise ValueError(
        "these samplings, together and under relation"
        f" {relation!r}, have no price in dp-accounting: report the runs one by"
        " one."
      )
    return (
      None,
      0.0,
      "PLD not computed: dp-accounting has none for this sampling",
    )
  size = rough_bound(composed, delta, relation) if by_rdp is None else by_rdp
  if not size <= MAX_EPSILON_FOR_PLD:
    name = "RDP bound" if by_rdp is not None else "bound by a Poisson stand-in"
    note = f"PLD not computed: the {name} exceeds {MAX_EPSILON_FOR_PLD:g}"
    return None, 0.0, note
  if not delta_for_pld(composed, delta):
    note = f"PLD not computed: its rounding may reach delta {delta:g}"
    return None, 0.0, note
  interval = pld_interval(composed, delta, relation, quick)
  return pld_bound(composed, delta, relation, interval), interval, ""


def has_rdp(composed: Sequence[Releases], relation: str) -> bool:
  """Whether dp-accounting bounds these releases by Renyi DP."""
  accountant = rdp.RdpAccountant(
    (2.0,), neighboring_relation=_relation(relation)
  )
  return bool(accountant.supports(event(composed)))


def has_pld(composed: Sequence[Releases], relation: str) -> bool:
  """Whether dp-accounting bounds these releases by privacy losses."""
  accountant = pld.PLDAccountant(neighboring_relation=_relation(relation))
  return bool(accountant.supports(event(composed)))


def rough_bound(
  composed: Sequence[Releases], delta: float, relation: str
) -> float:
  """Epsilon, more or less, at once: what to start a search with. No bound."""
  poisson = [
    Releases(r.count, r.sampling_prob, r.noise_multiplier) for r in composed
  ]
  found, _ = rdp_bound(poisson, delta, "zero_out", FEW_RDP_ORDERS)
  # To replace a unit is to take one away and to add one.
  return found * max(
    mechanisms.distance(dataclasses.replace(r, sampling="poisson"), relation)
    for r in composed
  )


def rdp_bound(
  composed: Sequence[Releases],
  delta: float,
  relation: str,
  orders: Sequence[float],
) -> tuple[float, float]:
  """Epsilon by Renyi DP and the order that gave it."""
  return _rdp_bound(tuple(composed), delta, relation, tuple(orders))


@functools.lru_cache(maxsize=256)
def _rdp_bound(
  composed: tuple[Releases, ...],
  delta: float,
  relation: str,
  orders: tuple[float, ...],
) -> tuple[float, float]:
  renyi = rdp.RdpAccountant(orders, neighboring_relation=_relation(relation))
  with without_order_warnings():
    renyi.compose(event(composed))
  value, order = renyi.get_epsilon_and_optimal_order(delta)
  return float(value), float(order)


def best_rdp(
  composed: Sequence[Releases], delta: float, relation: str
) -> tuple[float, float]:
  """`rdp_bound` by the best of `RDP_ORDERS`, asking those near the best few.

  Any order gives a valid bound; a better one elsewhere was never seen.
  """
  near = near_orders(composed, delta, relation)
  return rdp_bound(composed, delta, relation, near)


def near_orders(
  composed: Sequence[Releases], delta: float, relation: str
) -> list[float]:
  """Those of `RDP_ORDERS` among which the best one is, by a few of them."""
  few = FEW_RDP_ORDERS
  _, best = rdp_bound(composed, delta, relation, few)
  low = max((order for order in few if order < best), default=0.0)
  high = min((order for order in few if order > best), default=math.inf)
  return [order for order in RDP_ORDERS if low <= order <= high]


@functools.lru_cache(maxsize=64)
def pld_bound(
  composed: tuple[Releases, ...], delta: float, relation: str, interval: float
) -> float:
  """Epsilon by discretised privacy losses; infinite if delta is too small."""
  asked = delta_for_pld(composed, delta)
  if not asked:
    return math.inf
  losses = pld.PLDAccountant(
    neighboring_relation=_relation(relation),
    value_discretization_interval=interval,
  )
  losses.compose(event(composed))
  return float(losses.get_epsilon(asked))


def pld_error(composed: Sequence[Releases]) -> float:
  """By how much a delta of PLD may be too small.

  dp-accounting composes by Fourier transforms, whose rounding is an absolute
  error of delta that grows with the number of updates.
  """
  return _PLD_ERROR * sum(r.count for r in composed)


def delta_for_pld(composed: Sequence[Releases], delta: float) -> float:
  """What to ask PLD for, so that `delta` holds; 0 if it cannot be asked."""
  error = pld_error(composed)
  return delta - error if delta > 2 * error else 0.0


@functools.lru_cache(maxsize=256)
def pld_interval(
  composed: tuple[Releases, ...],
  delta: float,
  relation: str,
  quick: bool = False,
) -> float:
  """The PLD grid that a bound is quoted with, chosen from noise and updates.

  Args:
    composed: merged releases.
    delta: of the bound.
    relation: a key of `RELATIONS`.
    quick: a coarser one.
  """
  size = rough_bound(composed, delta, relation)
  wanted = _GRID_SHARE * size / math.sqrt(sum(r.count for r in composed))
  if quick or len(composed) > _MANY_MECHANISMS:
    wanted *= _COARSER
  fitting = [interval for interval in _INTERVALS if interval <= wanted]
  return max(fitting, default=_INTERVALS[0])


def epsilon_without_amplification(
  releases: Sequence[Releases], delta: float, relation: str = "zero_out"
) -> float:
  """Epsilon as if every release had read every unit (sampling_prob 1).

  The composition of Gaussian mechanisms is one Gaussian mechanism, whose
  epsilon dp-accounting gives in closed form (arXiv 1805.06530, Theorem 8).
  """
  check_delta(delta)
  if _without_noise(releases):
    return math.inf
  precision = sum(
    r.count * (mechanisms.distance(r, relation) / r.noise_multiplier) ** 2
    for r in releases
  )
  if not precision:
    return 0.0
  return float(
    dp_accounting.get_epsilon_gaussian(precision**-0.5, delta, tol=1e-9)
  )


def _is_within(
  releases: Sequence[Releases], budget: float, delta: float, relation: str
) -> bool:
  """Whether `epsilon` is at most `budget`; PLD is asked only if it must be."""
  composed = tuple(merged(releases))
  if composed and not _without_noise(composed) and has_rdp(composed, relation):
    rough, _ = rdp_bound(composed, delta, relation, FEW_RDP_ORDERS)
    if rough <= budget:
      return True
  return epsilon(releases, delta, relation).value <= budget


def affordable_steps(
  released_after: Callable[[int], Sequence[Releases]],
  most: int,
  target_epsilon: float,
  delta: float,
  relation: str = "zero_out",
) -> int:
  """How many more updates still fit into the budget.

  Args:
    released_after: what will have been released in all after n more updates;
      grows with n.
    most: updates that could be made.
    target_epsilon: the budget.
    delta: in (0, 1).
    relation: a key of `RELATIONS`.

  Returns:
    The largest n in 0..most for which `released_after(n)` costs at most
    `target_epsilon`; 0 if there is none.
  """

  def fits(n: int) -> bool:
    return _is_within(released_after(n), target_epsilon, delta, relation)

  low, high = 0, most
  if fits(high):
    return high
  while low < high - 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def check_delta(delta: float) -> None:
  """Raises ValueError unless 0 < delta < 1."""
  if not 0 < delta < 1:
    raise ValueError(f"delta={delta} must lie strictly between 0 and 1.")


def _without_noise(releases: Sequence[Releases]) -> bool:
  return any(r.count and r.noise_multiplier < _SMALLEST_NOISE for r in releases)


def _relation(name: str) -> dp_accounting.NeighboringRelation:
  if name not in RELATIONS:
    raise ValueError(
      f"neighbouring relation {name!r} cannot be priced; use one of"
      f" {sorted(RELATIONS)}."
    )
  return RELATIONS[name]


@contextlib.contextmanager
def without_order_warnings() -> Iterator[None]:
  """Hides dp-accounting's line per RDP order that it leaves out.

  Leaving an order out is sound, only looser, and the order that won is named in
  `Epsilon.settings`.
  """
  logger = logging.getLogger("absl")

  def keep(record: logging.LogRecord) -> bool:
    return "failed to converge" not in record.getMessage()

  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)
