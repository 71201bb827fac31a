"""Which samplings can be priced, under which neighbouring relation, and how.

A release is a Gaussian mechanism on a sample. Whatever the relation, noise is
stated in units of the most that one unit adds to the sum (the sensitivity of
`clipping.rules.ClippingRule`); under replace-one, where a unit is taken out and
another put in, the events below say so to dp-accounting.
"""

from collections.abc import Sequence
import dataclasses

import dp_accounting
from dp_accounting import dp_event
import numpy as np
from scipy import stats

RELATIONS = {
  "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
  "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
  "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}

# What is drawn, and the relations under which dp-accounting has a bound for it.
# Where sampling or normaliser need the number of records it must be public, and
# neighbours may not differ in it.
PRICED = {
  "poisson": ("zero_out", "add_or_remove_one", "replace_one"),
  "truncated_poisson": ("zero_out", "replace_one"),
  "without_replacement": ("replace_one",),
  "shuffled": ("zero_out", "replace_one"),
  "balls_in_bins": ("zero_out", "add_or_remove_one", "replace_one"),
  "cyclic_poisson": ("zero_out", "replace_one"),
}


@dataclasses.dataclass(frozen=True)
class Releases:
  """A number of equal releases: Gaussian mechanisms on samples.

  Attributes:
    count: how many.
    sampling_prob: probability that a given unit took part in one; 1 where no
      amplification by sampling is claimed.
    noise_multiplier: noise standard deviation over the most that one unit adds.
    sampling: "poisson", "truncated_poisson" (a larger sample is cut, at random,
      to `truncated_batch_size`) or "without_replacement" (of fixed size).
    num_examples: size of the corpus; read by the latter two.
    truncated_batch_size: the most records of one sample; read when truncated.
    group_size: records of one unit at most, each of which is sampled on its
      own, by Poisson sampling.
  """

  count: int
  sampling_prob: float
  noise_multiplier: float
  sampling: str = "poisson"
  num_examples: int = 0
  truncated_batch_size: int = 0
  group_size: int = 1

  def as_dict(self) -> dict[str, int | float | str]:
    """Plain data, without what its sampling does not read."""
    told: dict[str, int | float | str] = {
      "sampling_prob": self.sampling_prob,
      "noise_multiplier": self.noise_multiplier,
    }
    if self.group_size > 1:
      told["group_size"] = self.group_size
    if self.sampling == "poisson":
      return told
    told |= {"sampling": self.sampling, "num_examples": self.num_examples}
    if self.sampling == "truncated_poisson":
      told["truncated_batch_size"] = self.truncated_batch_size
    return told


def check_priced(sampling: str, relation: str) -> None:
  """Raises ValueError unless the sampling has a price under the relation."""
  if sampling not in PRICED:
    raise ValueError(
      f"sampling={sampling!r} is not known; use one of"
      f" {', '.join(map(repr, PRICED))}."
    )
  if relation not in RELATIONS:
    raise ValueError(
      f"relation={relation!r} is not known; use one of"
      f" {', '.join(map(repr, RELATIONS))}."
    )
  if relation not in PRICED[sampling]:
    raise ValueError(
      f"relation={relation!r} cannot be priced for sampling={sampling!r}: use"
      f" relation={' or '.join(map(repr, PRICED[sampling]))}, or another"
      " sampling."
    )


def event(releases: Sequence[Releases]) -> dp_accounting.DpEvent:
  """The composition of all `releases` as a dp-accounting event."""
  return dp_accounting.ComposedDpEvent(
    [
      dp_accounting.SelfComposedDpEvent(_single(r), r.count)
      for r in merged(releases)
    ]
  )


def merged(releases: Sequence[Releases]) -> list[Releases]:
  """Joins equal mechanisms and drops empty ones; order does not matter."""
  counts: dict[Releases, int] = {}
  for release in releases:
    if release.count:
      one = dataclasses.replace(
        release,
        count=1,
        sampling_prob=float(release.sampling_prob),
        noise_multiplier=float(release.noise_multiplier),
      )
      counts[one] = counts.get(one, 0) + release.count
  return [dataclasses.replace(one, count=n) for one, n in counts.items()]


def distance(release: Releases, relation: str) -> float:
  """How far one unit may move the sum, over the most that one unit adds.

  Where one record leaves a truncated sample, another may enter it.
  """
  one = relation != "replace_one" and release.sampling == "poisson"
  return (1.0 if one else 2.0) * release.group_size


def group_event(release: Releases, size: int) -> dp_accounting.DpEvent:
  """What a Poisson release is to a group of records that change together.

  Of a group of k, Binomial(k, q) records are in a sample, and each moves the
  sum by at most the sensitivity: a mixture of Gaussians (arXiv 2401.10294).

  Args:
    release: of one record.
    size: k.
  """
  members = np.arange(size + 1)
  chances = stats.binom.pmf(members, size, release.sampling_prob)
  present = chances > 0
  return dp_event.MixtureOfGaussiansDpEvent(
    release.noise_multiplier,
    members[present].astype(float).tolist(),
    (chances[present] / chances[present].sum()).tolist(),
  )


def _single(release: Releases) -> dp_accounting.DpEvent:
  q, noise = release.sampling_prob, release.noise_multiplier
  if release.group_size > 1:
    return group_event(release, release.group_size)
  if release.sampling == "poisson":
    return dp_accounting.PoissonSampledDpEvent(
      q, dp_accounting.GaussianDpEvent(noise)
    )
  if release.sampling == "truncated_poisson":
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
      dataset_size=release.num_examples,
      sampling_probability=q,
      truncated_batch_size=release.truncated_batch_size,
      noise_multiplier=noise,
    )
  if release.sampling == "without_replacement":
    # Replaced, a record moves the sum by twice what it may add to it: what this
    # event, unlike that of Poisson samples, expects to be in the noise.
    return dp_accounting.SampledWithoutReplacementDpEvent(
      release.num_examples,
      round(q * release.num_examples),
      dp_accounting.GaussianDpEvent(noise / 2),
    )
  raise ValueError(f"sampling={release.sampling!r} has no price.")
