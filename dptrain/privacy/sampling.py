"""Samples as pure functions of a key.

There is no state to restore and no host to agree with: whoever holds the key of
a step draws the same sample, or any part of it.

Records are drawn by blocks of `BLOCK`, each with a generator of its own, so
that time and memory follow the draw and not the corpus. All blocks of a sample
use one Philox key (two words of a threefry key) and disjoint ranges of its
256-bit counter: block b begins at b * 2^192 and would have to ask for 2^192
numbers to reach the next. Philox is a keyed permutation of counters, made to
pass for a random function (Salmon et al., SC 2011, "Parallel random numbers: as
easy as 1, 2, 3"), so outputs at different counters are as independent as those
of one stream.
"""

import dataclasses

import jax
import numpy as np
import numpy.typing as npt

# Records drawn together. Another number draws other samples: runs that resume
# would change theirs. A corpus of one block is drawn as it always was.
BLOCK = 2**20
# Counter of what concerns all blocks; no corpus has so many.
_ALL = 2**64 - 1
# How far above a fixed size the first draw aims: one in 1e9 is too small.
_DEVIATIONS = 6.0

Indices = npt.NDArray[np.int64]


def poisson_sample(
  key: jax.Array,
  num_examples: int,
  sampling_prob: float,
  truncated_batch_size: int | None = None,
) -> Indices:
  """Draws each of `num_examples` examples independently.

  In each block of records the size is binomial and, given its size, the set is
  uniform: that is equal in law to one coin of bias `sampling_prob` per example
  (arXiv 2406.17298, lemma 1); blocks are independent, as coins are. Nothing is
  shuffled or filled up.

  Formal guarantee: unit: one example (index). Every example is included
  independently with the same probability, which is public; what an attacker
  must not know is `key`. This is the sampling that `PoissonSampledDpEvent` of
  dp-accounting prices. With `truncated_batch_size`, of a larger sample a
  uniform part of that size is kept, which is what
  `TruncatedSubsampledGaussianDpEvent` prices (arXiv 2411.04205, 2508.15089).

  Takes time and memory in proportion to the examples drawn, and some
  microseconds for each block of the corpus. `poisson` makes parts of it.

  Args:
    key: typed threefry key, used for nothing else.
    num_examples: corpus size N.
    sampling_prob: in [0, 1].
    truncated_batch_size: the most examples of the whole sample; None for no
      limit.

  Returns:
    Sorted distinct indices, int64 [k]; k ~ min(Binomial(N,
    sampling_prob), truncated_batch_size).

  Raises:
    ValueError: for a probability outside [0, 1] or an empty corpus.
  """
  sample = poisson(key, num_examples, sampling_prob, truncated_batch_size)
  return sample.part(0, sample.size)


def fixed_size_sample(
  key: jax.Array,
  num_examples: int,
  size: int,
) -> Indices:
  """Draws `size` of `num_examples` examples, all sets being equally likely.

  A Poisson sample that has at least `size` members, of which a uniform part of
  that size is kept: given its size, a Poisson sample is a uniform set.

  Formal guarantee: the sampling that `SampledWithoutReplacementDpEvent` of
  dp-accounting prices, under replace-one.

  Args:
    key: typed threefry key, used for nothing else.
    num_examples: corpus size N, public.
    size: in 0..N.

  Returns:
    Sorted distinct indices, int64 [size].

  Raises:
    ValueError: for more examples than there are, or an empty corpus.
  """
  sample = fixed_size(key, num_examples, size)
  return sample.part(0, sample.size)


@dataclasses.dataclass(frozen=True)
class Sample:
  """A sample whose size by block is drawn, and whose members are not yet.

  Whoever needs a part of it makes that part only: one host of many.

  Formal guarantee: that of `poisson_sample` or `fixed_size_sample`; a part is
  what the whole holds there, however many parts there are.

  Attributes:
    two_words: of the key.
    num_examples: corpus size N.
    sizes: int64, members by block.
    sampling_prob: whose binomial draws come first in each block; None: none do.
  """

  two_words: tuple[int, int]
  num_examples: int
  sizes: Indices
  sampling_prob: float | None

  @property
  def size(self) -> int:
    """Members of the whole. PRIVATE."""
    return int(self.sizes.sum())

  def part(self, begin: int, end: int) -> Indices:
    """The members from place `begin` to before `end`, in their order.

    Args:
      begin: in 0..size.
      end: in begin..size.

    Returns:
      Sorted distinct indices, int64 [end - begin].

    Raises:
      ValueError: for places that the sample does not have.
    """
    if not 0 <= begin <= end <= self.size:
      raise ValueError(
        f"begin={begin}, end={end} must be places in a sample of {self.size}."
      )
    if begin == end:
      return np.zeros(0, np.int64)
    ends = np.cumsum(self.sizes)
    low, high = np.searchsorted(ends, (begin, end - 1), side="right")
    found = [self._members(block) for block in range(low, high + 1)]
    skipped = int(ends[low] - self.sizes[low])
    return np.concatenate(found)[begin - skipped : end - skipped]

  def _members(self, block: int) -> Indices:
    draw = generator(self.two_words, block)
    if self.sampling_prob is not None:
      _count(draw, self.num_examples, block, self.sampling_prob)
    return _uniform_set(draw, self.num_examples, block, int(self.sizes[block]))


def poisson(
  key: jax.Array,
  num_examples: int,
  sampling_prob: float,
  truncated_batch_size: int | None = None,
) -> Sample:
  """As `poisson_sample`, to be made part by part."""
  _check_not_empty(num_examples)
  if not 0.0 <= sampling_prob <= 1.0:
    raise ValueError(f"sampling_prob={sampling_prob} must lie in [0, 1].")
  two_words = words(key)
  sizes = np.array(
    [
      _count(generator(two_words, block), num_examples, block, sampling_prob)
      for block in range(-(-num_examples // BLOCK))
    ]
  )
  if truncated_batch_size is not None:
    sizes = _thinned(generator(two_words, _ALL), sizes, truncated_batch_size)
  return Sample(two_words, num_examples, sizes, sampling_prob)


def fixed_size(key: jax.Array, num_examples: int, size: int) -> Sample:
  """As `fixed_size_sample`, to be made part by part."""
  _check_not_empty(num_examples)
  if not 0 <= size <= num_examples:
    raise ValueError(f"size={size} must lie in 0..{num_examples}.")
  two_words = words(key)
  count = -(-num_examples // BLOCK)
  if count == 1:
    return Sample(two_words, num_examples, np.array([size]), None)
  lengths = [_length(num_examples, block) for block in range(count)]
  aim = size + _DEVIATIONS * (size + 1) ** 0.5
  draw = generator(two_words, _ALL)
  sizes = np.zeros(count, np.int64)
  while sizes.sum() < size:
    sizes = draw.binomial(lengths, min(1.0, aim / num_examples))
  sizes = _thinned(draw, sizes, size)
  return Sample(two_words, num_examples, sizes, None)


def words(key: jax.Array) -> tuple[int, int]:
  """128 bits out of a typed key, as two whole numbers."""
  bits = np.asarray(jax.random.bits(key, (4,), "uint32"), dtype=np.uint64)
  first, second = bits[:2] << np.uint64(32) | bits[2:]
  return int(first), int(second)


def generator(
  two_words: tuple[int, int], block: int = 0
) -> np.random.Generator:
  """A generator that is a function of `words` and of the number of a block."""
  philox = np.array(two_words, dtype=np.uint64)
  counter = np.array([0, 0, 0, block], dtype=np.uint64)
  return np.random.Generator(np.random.Philox(key=philox, counter=counter))


def _length(num_examples: int, block: int) -> int:
  return min(BLOCK, num_examples - block * BLOCK)


def _count(
  draw: np.random.Generator, num_examples: int, block: int, sampling_prob: float
) -> int:
  """Members of a block: the first that its generator draws."""
  return draw.binomial(_length(num_examples, block), sampling_prob)


def _thinned(
  draw: np.random.Generator, sizes: npt.NDArray[np.int64], most: int
) -> npt.NDArray[np.int64]:
  """Members by block of a uniform part of at most `most` members."""
  total = int(sizes.sum())
  if total <= most:
    return sizes
  # Which members of the whole leave; a block's own are all alike.
  leave = draw.choice(total, total - most, replace=False, shuffle=False)
  blocks = np.searchsorted(np.cumsum(sizes), leave, side="right")
  return sizes - np.bincount(blocks, minlength=len(sizes))


def _uniform_set(
  draw: np.random.Generator, num_examples: int, block: int, size: int
) -> Indices:
  length = _length(num_examples, block)
  drawn = draw.choice(length, size, replace=False, shuffle=False)
  return np.sort(drawn).astype(np.int64) + block * BLOCK


def _check_not_empty(num_examples: int) -> None:
  if num_examples < 1:
    raise ValueError(f"num_examples={num_examples} must be >= 1.")
