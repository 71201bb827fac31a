"""What was released on the same corpus beside the updates: a vocabulary, say.

Each is a Gaussian mechanism that reads every unit, up to a probability of
failure that is taken off delta before anything else is priced.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dptrain.privacy import accounting


class OtherRelease(NamedTuple):
  """One release that is no update.

  Formal guarantee: unit and relation: the plan's. But for an event of
  probability `failure_prob`, a Gaussian mechanism of `noise_multiplier`.
  Failures add up: delta pays for their sum, and what is left of it for all
  mechanisms together.

  Attributes:
    what: in words.
    name: digest of what was published: equal content is one release.
    noise_multiplier: in the units of the plan's: over the most that one unit
      adds, where the relation doubles that (`mechanisms.distance`).
    failure_prob: at most so often the release is not what that mechanism gives.
  """

  what: str
  name: str
  noise_multiplier: float
  failure_prob: float

  def as_dict(self) -> dict[str, Any]:
    """Plain data."""
    return self._asdict()


class DeclaredPublic(NamedTuple):
  """What entered a run without protection, since its user says it is public.

  Formal guarantee: none is needed for what no private record has entered. That
  this is so is taken on trust, and told by the report.

  Attributes:
    what: in words.
    fingerprint: names its content.
  """

  what: str
  fingerprint: str


def from_dict(told: Mapping[str, Any]) -> OtherRelease:
  """What `as_dict` told, among other things."""
  return OtherRelease(**{name: told[name] for name in OtherRelease._fields})


def releases(others: Sequence[OtherRelease]) -> list[accounting.Releases]:
  """Each as a release that reads every unit."""
  return [
    accounting.Releases(1, 1.0, other.noise_multiplier) for other in others
  ]


def failure_prob(others: Sequence[OtherRelease]) -> float:
  """Of any of them, at most."""
  return sum(other.failure_prob for other in others)


def delta_left(others: Sequence[OtherRelease], delta: float) -> float:
  """What of `delta` is left to price releases with.

  Args:
    others: each counts once.
    delta: of the whole guarantee.

  Raises:
    ValueError: the failures of the others alone reach delta.
  """
  left = delta - failure_prob(others)
  if left > 0:
    return left
  raise ValueError(
    f"delta={delta:g} is used up by the failure probability"
    f" {failure_prob(others):g} of {'; '.join(o.what for o in others)}: raise"
    " delta, or learn the vocabulary with a smaller --delta."
  )
