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
  *,
  first: int = 0,
  last: int | None = None,
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

  Takes time and memory in proportion to the examples drawn in `first`..`last`,
  and some microseconds for each block there (for each block of the corpus, if
  truncated).

  Args:
    key: typed threefry key, used for nothing else.
    num_examples: corpus size N.
    sampling_prob: in [0, 1].
    truncated_batch_size: the most examples of the whole sample; None for no
      limit.
    first: the part of the sample in [first, last) is returned: what the whole
      holds there, whatever else is asked for.
    last: N if None.

  Returns:
    Sorted distinct indices, int64 [k]; of the whole corpus, k ~
    min(Binomial(N, sampling_prob), truncated_batch_size).

  Raises:
    ValueError: for a probability outside [0, 1], an empty corpus, or a part
      that is none.
  """
  _check_not_empty(num_examples)
  if not 0.0 <= sampling_prob <= 1.0:
    raise ValueError(f"sampling_prob={sampling_prob} must lie in [0, 1].")
  part = _blocks_of(num_examples, first, last)
  two_words = words(key)

  def begun(block: int) -> tuple[np.random.Generator, int]:
    draw = generator(two_words, block)
    return draw, draw.binomial(_length(num_examples, block), sampling_prob)

  sizes = None
  if truncated_batch_size is not None:
    count = -(-num_examples // BLOCK)
    sizes = np.array([begun(block)[1] for block in range(count)])
    sizes = _thinned(generator(two_words, _ALL), sizes, truncated_batch_size)
  found = []
  for block in part:
    draw, size = begun(block)
    if sizes is not None:
      size = sizes[block]
    found.append(_uniform_set(draw, num_examples, block, size))
  return _joined(found, first, last)


def fixed_size_sample(
  key: jax.Array,
  num_examples: int,
  size: int,
  *,
  first: int = 0,
  last: int | None = None,
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
    first: the part of the sample in [first, last) is returned.
    last: N if None.

  Returns:
    Sorted distinct indices, int64 [size] of the whole corpus.

  Raises:
    ValueError: for more examples than there are, an empty corpus, or a part
      that is none.
  """
  _check_not_empty(num_examples)
  if not 0 <= size <= num_examples:
    raise ValueError(f"size={size} must lie in 0..{num_examples}.")
  part = _blocks_of(num_examples, first, last)
  two_words = words(key)
  count = -(-num_examples // BLOCK)
  if count == 1:
    sizes = np.array([size])
  else:
    lengths = [_length(num_examples, block) for block in range(count)]
    aim = size + _DEVIATIONS * (size + 1) ** 0.5
    draw = generator(two_words, _ALL)
    sizes = np.zeros(count, np.int64)
    while sizes.sum() < size:
      sizes = draw.binomial(lengths, min(1.0, aim / num_examples))
    sizes = _thinned(draw, sizes, size)
  found = [
    _uniform_set(generator(two_words, block), num_examples, block, sizes[block])
    for block in part
  ]
  return _joined(found, first, last)


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


def _blocks_of(num_examples: int, first: int, last: int | None) -> range:
  """The blocks that [first, last) touches."""
  end = num_examples if last is None else last
  if not 0 <= first <= end <= num_examples:
    raise ValueError(
      f"first={first}, last={last} must be a part of 0..{num_examples}."
    )
  return range(first // BLOCK, -(-end // BLOCK) if end > first else 0)


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


def _joined(found: list[Indices], first: int, last: int | None) -> Indices:
  """Sorted sets of successive blocks as one, cut to [first, last)."""
  if not found:
    return np.zeros(0, np.int64)
  if first:
    found[0] = found[0][np.searchsorted(found[0], first) :]
  if last is not None:
    found[-1] = found[-1][: np.searchsorted(found[-1], last)]
  return np.concatenate(found)


def _check_not_empty(num_examples: int) -> None:
  if num_examples < 1:
    raise ValueError(f"num_examples={num_examples} must be >= 1.")
