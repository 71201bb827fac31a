"""A private histogram of words: how many units hold each, with noise.

The words themselves are private: which of them may appear at all is decided by
a threshold on the noisy count (partition selection; arXiv 2002.09745,
2006.03684). docs/vocabulary.md has the proof.
"""

from array import array
import collections
from collections.abc import Iterable, Mapping
import dataclasses
import functools
import hashlib
import heapq
import math

import numpy as np
from scipy import special

from dptrain.privacy import keys
from dptrain.privacy import mechanisms
from dptrain.privacy import sampling

# Each is a part of the next: a unit's protection covers its parts.
UNITS = ("record", "document", "user")

# Two neighbours may both hold words of their own, and a mechanism that fails on
# one side with probability p costs up to p / (1 - p) on the other: thirds cover
# both, for any number of releases whose failures sum to at most 1.
_SHARE_OF_FAILURE = 1 / 3
# Words of a unit that are remembered for each that will count.
_HELD_PER_COUNTED = 16
_MOST_USES = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordRelease:
  """How a histogram of words is made private.

  Formal guarantee: unit: all words that were added under one key. Neighbours
  differ in one unit, which one of them lacks, or whose words are others. A unit
  adds 1 to at most k = `words_per_unit` counts: without it the vector of counts
  moves by at most sqrt(k) in L2, with other words by at most sqrt(2 k). Noise
  of standard deviation noise_multiplier * sqrt(k) on each count that is not 0.
  Words that one neighbour alone holds are released with probability at most
  `failure_prob` / 3 altogether; but for that, this is the Gaussian mechanism on
  the others (`priced`). Public: all settings. The counts before noise, and
  which words were counted, are PRIVATE.

  Attributes:
    words_per_unit: k, the most distinct words of one unit that count.
    noise_multiplier: noise over sqrt(k).
    failure_prob: delta of the selection, apart from that of the noise.

  Raises:
    ValueError: if a setting is out of range.
  """

  words_per_unit: int
  noise_multiplier: float
  failure_prob: float

  def __post_init__(self) -> None:
    k = self.words_per_unit
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
      raise ValueError(f"words_per_unit={k!r} must be a whole number >= 1.")
    if not 0 < self.noise_multiplier < math.inf:
      raise ValueError(
        f"noise_multiplier={self.noise_multiplier} of the vocabulary must be a"
        " positive, finite number."
      )
    if not 0 < self.failure_prob < 1:
      raise ValueError(
        f"failure_prob={self.failure_prob} must lie strictly between 0 and 1."
      )

  @property
  def noise_stddev(self) -> float:
    """Of the noise on one count."""
    return self.noise_multiplier * math.sqrt(self.words_per_unit)

  @property
  def threshold(self) -> float:
    """A word is kept if its noisy count exceeds this.

    k independent counts of 1 all stay below it but for a probability of a third
    of `failure_prob` (arXiv 2002.09745, whose weights are 1 / sqrt(k); fewer
    words are covered by more).
    """
    fails = self.failure_prob * _SHARE_OF_FAILURE
    of_one = -math.expm1(math.log1p(-fails) / self.words_per_unit)
    return 1.0 - self.noise_stddev * float(special.ndtri(of_one))


class WordCounts:
  """Counts, for each word, the units that hold it. PRIVATE.

  Of a unit with more than k distinct words those k count that it uses most, and
  of words that it uses equally often random ones: long texts agree on little
  else. Which ones is a function of the secret seed, the unit's key and its own
  texts, in their order: not of any other unit. Memory: a unit's distinct words,
  at most 32 k of them, at 8 bytes each.
  """

  def __init__(self, words_per_unit: int, seed: keys.SecretSeed):
    """Starts with nothing.

    Args:
      words_per_unit: k.
      seed: secret; another one for each release.
    """
    self._k = words_per_unit
    self._seed = seed
    self._words: list[str] = []
    self._ids: dict[str, int] = {}
    # Of each unit, the numbers of its words, and then how often it uses each.
    self._held: dict[bytes, array[int]] = {}

  def add(self, unit: str, words: Iterable[str]) -> None:
    """Adds words to a unit, which may have been added to before.

    Args:
      unit: its key.
      words: in any order, as often as they occur.
    """
    own = self._seed.digest("words of a unit", unit)
    uses = collections.Counter(words)
    uses.update(self._uses(own))
    if len(uses) > 2 * _HELD_PER_COUNTED * self._k:
      # What a unit seldom uses so far is forgotten: memory stays bounded.
      most = _most_used(own, uses, _HELD_PER_COUNTED * self._k)
      uses = collections.Counter({word: uses[word] for word in most})
    times = (min(each, _MOST_USES) for each in uses.values())
    self._held[own] = array("I", [*map(self._id, uses), *times])

  def counts(self) -> dict[str, int]:
    """Units by word, for each word that counts for a unit at least. PRIVATE."""
    found: dict[str, int] = {}
    for own in self._held:
      for word in _most_used(own, self._uses(own), self._k):
        found[word] = found.get(word, 0) + 1
    return found

  def _uses(self, own: bytes) -> dict[str, int]:
    """How often a unit uses each of its words, as far as is remembered."""
    held = self._held.get(own, array("I"))
    size = len(held) // 2
    return {
      self._words[i]: n for i, n in zip(held[:size], held[size:], strict=True)
    }

  def _id(self, word: str) -> int:
    found = self._ids.setdefault(word, len(self._words))
    if found == len(self._words):
      self._words.append(word)
    return found


def noisy_counts(
  counts: Mapping[str, int], release: WordRelease, seed: keys.SecretSeed
) -> dict[str, int]:
  """The release: noisy counts of the words that pass the threshold.

  The one use of `counts`; whatever is computed from the result is free.

  Args:
    counts: of `WordCounts`. PRIVATE.
    release: noise and threshold.
    seed: secret, and used for one release only: two histograms under the same
      noise betray their difference.

  Returns:
    Noisy counts, rounded, at least 1, in the order of the words.
  """
  two = np.frombuffer(seed.digest("noise of words", "")[:16], "<u8")
  draw = sampling.generator((int(two[0]), int(two[1])))
  words = sorted(counts)  # any order that does not tell how they were met
  exact = np.array([counts[word] for word in words], np.float64)
  noisy = exact + release.noise_stddev * draw.standard_normal(len(words))
  return {
    words[i]: max(1, round(float(noisy[i])))
    for i in np.flatnonzero(noisy > release.threshold)
  }


def priced(
  noise_multiplier: float, unit: str, within: str, relation: str
) -> float:
  """The noise multiplier that a plan's accountant shall read.

  Formal guarantee: without a unit the counts move by one sensitivity, sqrt(k).
  A unit with other words moves them by sqrt(2) of it, since two sets of k words
  differ in 2 k. So does a part of a unit (a record of a document), under any
  relation: when it goes, or changes, other words of the unit may count instead.

  Args:
    noise_multiplier: of `WordRelease`.
    unit: what the words were counted by.
    within: the plan's unit: the same, or a part of it.
    relation: the plan's.

  Returns:
    The noise over the sensitivity, in the relation's terms: where that expects
    a distance of two sensitivities, sqrt(2) of them count as such.

  Raises:
    ValueError: the plan's unit is larger than what the words were counted by.
  """
  if UNITS.index(within) > UNITS.index(unit):
    raise ValueError(
      f"the vocabulary was learned with one {unit} as its unit, which does not"
      f" protect a {within}, PrivacySettings.unit: learn it again with"
      f" --unit={within}, or give another vocabulary."
    )
  moved = 1.0 if unit == within and relation != "replace_one" else math.sqrt(2)
  expected = mechanisms.distance(
    mechanisms.Releases(1, 1.0, noise_multiplier), relation
  )
  return noise_multiplier * expected / moved


def _most_used(own: bytes, uses: Mapping[str, int], limit: int) -> list[str]:
  """At most so many words of a unit: the most used, ties by keyed hash."""
  if len(uses) <= limit:
    return list(uses)
  least = heapq.nlargest(limit, uses.values())[-1]
  sure = [word for word, times in uses.items() if times > least]
  tied = (word for word, times in uses.items() if times == least)
  luck = functools.partial(_luck, own)
  return sure + heapq.nsmallest(limit - len(sure), tied, key=luck)


def _luck(own: bytes, word: str) -> tuple[bytes, str]:
  digest = hashlib.blake2b(word.encode(), digest_size=16, key=own).digest()
  return digest, word
