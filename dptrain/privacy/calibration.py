"""How much noise a budget takes: accounting the other way round."""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np
from scipy import optimize

from dptrain.privacy import accounting

_LARGEST_NOISE = 1e4
_NOISE_TOLERANCE = 1e-4
# What the search, which takes logarithms, reads for an epsilon of 0.
_SMALLEST_EPSILON = 1e-12
# By how much log epsilon rises when log noise falls, more or less.
_USUAL_SLOPE = 2.5
# A search among as many mechanisms finds what is then checked with all.
_SEARCHED_MECHANISMS = 8


def noise_multiplier(
  releases_of: Callable[[float], Sequence[accounting.Releases]],
  target_epsilon: float,
  delta: float,
  relation: str = "zero_out",
) -> float:
  """Smallest noise multiplier, to 4 decimals, that stays within a budget.

  Args:
    releases_of: what a run of a given noise multiplier releases.
    target_epsilon: the budget.
    delta: in (0, 1).
    relation: a key of `accounting.RELATIONS`.

  Returns:
    A noise multiplier for which `accounting.epsilon(...)` does not exceed
    `target_epsilon`.

  Raises:
    ValueError: no noise multiplier up to 10,000 reaches the budget.
  """
  search = _Search(releases_of, target_epsilon, delta, relation)
  root = search.root_by_rdp()
  if target_epsilon <= accounting.MAX_EPSILON_FOR_PLD and search.has_pld():
    # RDP answers at once, PLD asks for less noise.
    root = search.root_by_pld(root)

  def fits(steps: int) -> bool:
    noise = round(steps * _NOISE_TOLERANCE, 4)
    return noise > 0 and search.quoted(noise) <= target_epsilon

  # The root is good to a few steps; what counts is the bound that is quoted.
  steps = round(_rounded(root) / _NOISE_TOLERANCE)
  return round(_first_that_fits(fits, steps) * _NOISE_TOLERANCE, 4)


def _root(
  excess: Callable[[float, float], float],
  start: float,
  gap: float,
  offset: float,
) -> float:
  """Where `excess` is 0, from a `start` where it is about `gap`."""
  found = optimize.root_scalar(
    excess,
    args=(offset,),
    x0=start,
    x1=start + (gap / _USUAL_SLOPE or -0.01),
    xtol=10 * _NOISE_TOLERANCE,
    maxiter=12,
  )
  return float(found.root) if found.converged else start


def _log(epsilon: float) -> float:
  return math.log(max(epsilon, _SMALLEST_EPSILON))


def _rounded(log_noise: float) -> float:
  """The noise multiplier, of 4 decimals, that is nearest."""
  steps = max(1, round(math.exp(log_noise) / _NOISE_TOLERANCE))
  return round(steps * _NOISE_TOLERANCE, 4)


def _thinned(
  releases: tuple[accounting.Releases, ...],
) -> tuple[accounting.Releases, ...]:
  """Fewer kinds of releases that cost about as much; no bound.

  Epsilon goes by the square of a small sampling probability: neighbours of one
  kind get the root of their mean square.
  """
  if len(releases) <= _SEARCHED_MECHANISMS:
    return releases
  kinds: dict[accounting.Releases, list[accounting.Releases]] = {}
  for release in sorted(releases, key=lambda r: r.sampling_prob):
    kind = dataclasses.replace(
      release, count=1, sampling_prob=0.0, truncated_batch_size=0
    )
    kinds.setdefault(kind, []).append(release)
  few = []
  for alike in kinds.values():
    num_parts = min(len(alike), _SEARCHED_MECHANISMS)
    for part in np.array_split(np.arange(len(alike)), num_parts):
      members = [alike[i] for i in part]
      count = sum(r.count for r in members)
      square = sum(r.count * r.sampling_prob**2 for r in members) / count
      few.append(
        dataclasses.replace(
          members[-1], count=count, sampling_prob=math.sqrt(square)
        )
      )
  return tuple(few)


def _first_that_fits(fits: Callable[[int], bool], start: int) -> int:
  """Smallest whole number that fits, found quickly if `start` is near it."""
  low, high, stride = start - 1, start, 1
  while fits(low):
    low, high, stride = low - stride, low, 2 * stride
  while not fits(high):
    low, high, stride = high, high + stride, 2 * stride
  while low < high - 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle, high)
  return high


@dataclasses.dataclass(frozen=True)
class _Search:
  """Bounds on epsilon as functions of the noise; arguments as above."""

  releases_of: Callable[[float], Sequence[accounting.Releases]]
  target_epsilon: float
  delta: float
  relation: str

  def excess(self, bound: Callable[[float], float], log_noise: float) -> float:
    """log(epsilon / target): falls with the noise, 0 where it is right."""
    return _log(bound(math.exp(log_noise))) - math.log(self.target_epsilon)

  def quoted(self, noise: float) -> float:
    """What `accounting.epsilon` says."""
    releases = self._releases(noise)
    return accounting.epsilon(releases, self.delta, self.relation).value

  def has_pld(self) -> bool:
    """Whether PLD prices this."""
    return accounting.has_pld(self._releases(1.0), self.relation)

  def has_rdp(self) -> bool:
    """Whether RDP does."""
    return accounting.has_rdp(self._releases(1.0), self.relation)

  def by_few_orders(self, noise: float) -> float:
    """By RDP, loosely; where it has no bound, about right."""
    composed = _thinned(self._releases(noise))
    if not self.has_rdp():
      return accounting.rough_bound(composed, self.delta, self.relation)
    orders = accounting.FEW_RDP_ORDERS
    return accounting.rdp_bound(composed, self.delta, self.relation, orders)[0]

  def root_by_rdp(self) -> float:
    """Log noise that is enough by RDP.

    Raises:
      ValueError: there is none.
    """

    def excess(log_noise: float) -> float:
      return self.excess(self.by_few_orders, log_noise)

    if not 0 < self.target_epsilon < math.inf or (
      excess(math.log(_LARGEST_NOISE)) > 0
    ):
      raise ValueError(
        f"target_epsilon={self.target_epsilon} is reached by no noise"
        f" multiplier up to {_LARGEST_NOISE:g} at delta={self.delta}: raise"
        " target_epsilon or delta, or train for fewer updates or with smaller"
        " batches."
      )
    low, high = 0.0, 0.0
    while excess(high) > 0:
      low, high = high, high + 0.5
    while low == high or excess(low) <= 0:
      low, high = low - 0.5, low
    return float(optimize.brentq(excess, low, high, xtol=10 * _NOISE_TOLERANCE))

  def root_by_pld(self, start: float) -> float:
    """Log noise that is about enough by PLD, from one that is by RDP."""
    interval = accounting.pld_interval(
      self._releases(math.exp(start)), self.delta, self.relation
    )

    def by_few(noise: float) -> float:
      few = _thinned(self._releases(noise))
      return accounting.pld_bound(few, self.delta, self.relation, interval)

    def excess(log_noise: float, offset: float) -> float:
      return offset + self.excess(by_few, log_noise)

    gap = excess(start, 0.0)
    if gap > 0 and self.has_rdp():
      return start  # a coarse grid can lose to RDP
    root = _root(excess, start, gap, 0.0)
    # By how much the search prices too low: the same nearby.
    noise = _rounded(root)
    offset = _log(self._quoted_pld(noise)) - _log(by_few(noise))
    if abs(offset) * noise < _NOISE_TOLERANCE:
      return root
    return _root(excess, root, offset, offset)

  def _quoted_pld(self, noise: float) -> float:
    releases, asked = self._releases(noise), (self.delta, self.relation)
    interval = accounting.pld_interval(releases, *asked)
    return accounting.pld_bound(releases, *asked, interval)

  def _releases(self, noise: float) -> tuple[accounting.Releases, ...]:
    return tuple(accounting.merged(self.releases_of(noise)))
