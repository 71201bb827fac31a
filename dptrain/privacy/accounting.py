"""What releases cost: epsilon, by dp-accounting and nothing else.

Every epsilon that dptrain prints comes out of this file, and every number in
this file comes out of dp-accounting. Both of its accountants give a valid upper
bound (RDP, arXiv 1702.07476; PLD, arXiv 2207.04380), so the smaller is quoted,
with its settings.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import logging
import math

import dp_accounting
from dp_accounting import pld
from dp_accounting import rdp
from scipy import optimize

RELATIONS = {
  "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
  "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
}

# Low orders decide at little noise, high ones at much.
RDP_ORDERS = tuple(
  [1 + x / 10.0 for x in range(1, 100)]
  + list(range(11, 64))
  + [80, 96, 128, 192, 256, 512, 1024, 2048, 4096]
)

# PLD time grows with segments / interval; fine grids only while that is quick.
_FINE_INTERVAL, _COARSE_INTERVAL = 1e-4, 1e-3
_MAX_SEGMENTS_FOR_FINE = 8
# Its memory grows with epsilon / interval, and nobody defends more than this.
_MAX_EPSILON_FOR_PLD = 50.0

_LARGEST_NOISE = 1e4
_NOISE_TOLERANCE = 1e-4
# Below it dp-accounting overflows to NaN; epsilon is beyond 1e200 anyway.
_SMALLEST_NOISE = 1e-100
# What calibration, which takes logarithms, reads for an epsilon of 0.
_SMALLEST_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Releases:
  """A number of equal releases: Poisson-subsampled Gaussian mechanisms.

  Attributes:
    count: how many.
    sampling_prob: probability that a given unit took part in one.
    noise_multiplier: noise standard deviation over sensitivity.
  """

  count: int
  sampling_prob: float
  noise_multiplier: float


@dataclasses.dataclass(frozen=True)
class Epsilon:
  """An upper bound on epsilon and how it was found.

  Attributes:
    value: the smaller of the two bounds.
    accountant: whose bound that is, "PLD" or "RDP".
    settings: grid or order of that accountant, in words.
    rdp: the RDP bound.
    pld: the PLD bound; None when it was not computed.
    note: why PLD was not computed, or empty.
  """

  value: float
  accountant: str
  settings: str
  rdp: float
  pld: float | None
  note: str = ""

  def as_dict(self) -> dict[str, float | str | None]:
    """Plain data for JSON; an infinite bound becomes the string "inf"."""
    return {
      name: "inf" if value == math.inf else value
      for name, value in dataclasses.asdict(self).items()
    }


def event(releases: Sequence[Releases]) -> dp_accounting.DpEvent:
  """The composition of all `releases` as a dp-accounting event."""
  return dp_accounting.ComposedDpEvent(
    [
      dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(
          r.sampling_prob, dp_accounting.GaussianDpEvent(r.noise_multiplier)
        ),
        r.count,
      )
      for r in merged(releases)
    ]
  )


def merged(releases: Sequence[Releases]) -> list[Releases]:
  """Joins equal mechanisms and drops empty ones; order does not matter."""
  counts: dict[tuple[float, float], int] = {}
  for release in releases:
    if release.count:
      pair = (float(release.sampling_prob), float(release.noise_multiplier))
      counts[pair] = counts.get(pair, 0) + release.count
  return [Releases(n, q, noise) for (q, noise), n in counts.items()]


def epsilon(
  releases: Sequence[Releases],
  delta: float,
  relation: str = "zero_out",
  *,
  quick: bool = False,
) -> Epsilon:
  """Smallest valid bound on epsilon at `delta`.

  Formal guarantee: the composition of `releases` is (epsilon, delta)-DP under
  `relation`, provided that each was a Gaussian mechanism on a Poisson sample of
  the stated probability; counts, probabilities and noise are public.

  Args:
    releases: what was, or will be, released.
    delta: in (0, 1).
    relation: a key of `RELATIONS`.
    quick: use the coarse PLD grid, for progress displays.

  Returns:
    The bound with its settings.

  Raises:
    ValueError: unknown relation or delta out of range.
  """
  check_delta(delta)
  _relation(relation)
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
  neighbouring = _relation(relation)
  if _without_noise(composed):
    note = f"PLD not computed: noise below {_SMALLEST_NOISE:g} counts as none"
    return Epsilon(math.inf, "RDP", "no noise", math.inf, None, note)
  whole = event(composed)
  renyi = rdp.RdpAccountant(RDP_ORDERS, neighboring_relation=neighbouring)
  with _without_order_warnings():
    renyi.compose(whole)
  renyi_epsilon, order = renyi.get_epsilon_and_optimal_order(delta)
  renyi_epsilon, settings = float(renyi_epsilon), f"order {float(order):g}"
  if not renyi_epsilon <= _MAX_EPSILON_FOR_PLD:
    note = f"PLD not computed: the RDP bound exceeds {_MAX_EPSILON_FOR_PLD:g}"
    return Epsilon(renyi_epsilon, "RDP", settings, renyi_epsilon, None, note)
  fine = not quick and len(composed) <= _MAX_SEGMENTS_FOR_FINE
  interval = _FINE_INTERVAL if fine else _COARSE_INTERVAL
  losses = pld.PLDAccountant(
    neighboring_relation=neighbouring, value_discretization_interval=interval
  )
  losses.compose(whole)
  pld_epsilon = float(losses.get_epsilon(delta))
  if pld_epsilon < renyi_epsilon:
    settings = f"discretisation interval {interval:g}"
    return Epsilon(pld_epsilon, "PLD", settings, renyi_epsilon, pld_epsilon)
  return Epsilon(renyi_epsilon, "RDP", settings, renyi_epsilon, pld_epsilon)


def epsilon_without_amplification(
  releases: Sequence[Releases], delta: float
) -> float:
  """Epsilon as if every release had read every unit (sampling_prob 1).

  The composition of Gaussian mechanisms is one Gaussian mechanism, whose
  epsilon dp-accounting gives in closed form (arXiv 1805.06530, Theorem 8).
  """
  check_delta(delta)
  if _without_noise(releases):
    return math.inf
  precision = sum(r.count / r.noise_multiplier**2 for r in releases)
  if not precision:
    return 0.0
  return float(
    dp_accounting.get_epsilon_gaussian(precision**-0.5, delta, tol=1e-9)
  )


def calibrate_noise_multiplier(
  batches: Sequence[tuple[int, float]],
  target_epsilon: float,
  delta: float,
  relation: str = "zero_out",
) -> float:
  """Smallest noise multiplier, to 4 decimals, that stays within a budget.

  Args:
    batches: pairs (number of updates, sampling_prob).
    target_epsilon: the budget.
    delta: in (0, 1).
    relation: a key of `RELATIONS`.

  Returns:
    A noise multiplier whose `epsilon(...)` does not exceed `target_epsilon`.

  Raises:
    ValueError: no noise multiplier up to 10,000 reaches the budget.
  """

  def excess(log_noise: float) -> float:
    noise = math.exp(log_noise)
    releases = [Releases(count, q, noise) for count, q in batches]
    spent = epsilon(releases, delta, relation, quick=True).value
    return math.log(max(spent, _SMALLEST_EPSILON) / target_epsilon)

  low, high = 0.0, 0.0
  if not 0 < target_epsilon < math.inf or excess(math.log(_LARGEST_NOISE)) > 0:
    raise ValueError(
      f"target_epsilon={target_epsilon} is reached by no noise multiplier up to"
      f" {_LARGEST_NOISE:g} at delta={delta}: raise target_epsilon or delta, or"
      " train for fewer updates or with smaller batches."
    )
  while excess(high) > 0:
    low, high = high, high + 0.5
  while low == high or excess(low) <= 0:
    low, high = low - 0.5, low
  root = optimize.brentq(excess, low, high, xtol=_NOISE_TOLERANCE / 10)
  steps = math.floor(math.exp(root) / _NOISE_TOLERANCE)

  def fits(noise: float) -> bool:
    releases = [Releases(count, q, noise) for count, q in batches]
    return epsilon(releases, delta, relation).value <= target_epsilon

  # The root is good to a step or so; what counts is the bound that is quoted.
  while not fits(round(steps * _NOISE_TOLERANCE, 4)):
    steps += 1
  return round(steps * _NOISE_TOLERANCE, 4)


def affordable_steps(
  spent: Sequence[Releases],
  coming: Sequence[Releases],
  target_epsilon: float,
  delta: float,
  relation: str = "zero_out",
) -> int:
  """How many of the `coming` releases, in order, still fit into the budget.

  Args:
    spent: what has been released already.
    coming: what training would release next, in order.
    target_epsilon: the budget.
    delta: in (0, 1).
    relation: a key of `RELATIONS`.

  Returns:
    The largest n such that `spent` and the first n of `coming` together cost at
    most `target_epsilon`; 0 if `spent` alone exceeds it.
  """

  def fits(n: int) -> bool:
    both = [*spent, *first_releases(coming, n)]
    return epsilon(both, delta, relation).value <= target_epsilon

  low, high = 0, sum(r.count for r in coming)
  if fits(high):
    return high
  while low < high - 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def first_releases(releases: Sequence[Releases], n: int) -> list[Releases]:
  """The first `n` single releases out of runs of equal ones."""
  taken = []
  for release in releases:
    count = min(n, release.count)
    n -= count
    taken.append(dataclasses.replace(release, count=count))
  return [release for release in taken if release.count]


def check_delta(delta: float) -> None:
  """Raises ValueError unless 0 < delta < 1."""
  if not 0 < delta < 1:
    raise ValueError(f"delta={delta} must lie strictly between 0 and 1.")


def _without_noise(releases: Sequence[Releases]) -> bool:
  return any(r.count and r.noise_multiplier < _SMALLEST_NOISE for r in releases)


def _relation(name: str) -> dp_accounting.NeighboringRelation:
  if name not in RELATIONS:
    raise ValueError(
      f"neighbouring relation {name!r} cannot be priced for Poisson sampling;"
      f" use one of {sorted(RELATIONS)}."
    )
  return RELATIONS[name]


@contextlib.contextmanager
def _without_order_warnings() -> Iterator[None]:
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
