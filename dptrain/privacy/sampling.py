"""Samples as pure functions of a key.

There is no state to restore and no host to agree with: whoever holds the key of
a step draws the same sample.
"""

import jax
import numpy as np


def poisson_sample(
  key: jax.Array,
  num_examples: int,
  sampling_prob: float,
  truncated_batch_size: int | None = None,
) -> np.ndarray:
  """Draws each of `num_examples` examples independently.

  The size is binomial and, given its size, the set is uniform: that is equal in
  law to one coin of bias `sampling_prob` per example (arXiv 2406.17298, lemma
  1). Nothing is shuffled or filled up.

  Formal guarantee: unit: one example (index). Every example is included
  independently with the same probability, which is public; what an attacker
  must not know is `key`. This is the sampling that `PoissonSampledDpEvent` of
  dp-accounting prices. With `truncated_batch_size`, of a larger sample a
  uniform part of that size is kept, which is what
  `TruncatedSubsampledGaussianDpEvent` prices (arXiv 2411.04205, 2508.15089).

  Args:
    key: typed threefry key, used for nothing else.
    num_examples: corpus size N.
    sampling_prob: in [0, 1].
    truncated_batch_size: the most examples of a sample; None for no limit.

  Returns:
    Sorted distinct indices, int64 [k], k ~ min(Binomial(N, sampling_prob),
    truncated_batch_size).

  Raises:
    ValueError: for a probability outside [0, 1] or an empty corpus.
  """
  _check_not_empty(num_examples)
  if not 0.0 <= sampling_prob <= 1.0:
    raise ValueError(f"sampling_prob={sampling_prob} must lie in [0, 1].")
  draw = generator(words(key))
  size = draw.binomial(num_examples, sampling_prob)
  if truncated_batch_size is not None:
    size = min(size, truncated_batch_size)
  return _uniform_set(draw, num_examples, size)


def fixed_size_sample(
  key: jax.Array, num_examples: int, size: int
) -> np.ndarray:
  """Draws `size` of `num_examples` examples, all sets being equally likely.

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
  _check_not_empty(num_examples)
  if not 0 <= size <= num_examples:
    raise ValueError(f"size={size} must lie in 0..{num_examples}.")
  return _uniform_set(generator(words(key)), num_examples, size)


def words(key: jax.Array) -> tuple[int, int]:
  """128 bits out of a typed key, as two whole numbers."""
  bits = np.asarray(jax.random.bits(key, (4,), "uint32"), dtype=np.uint64)
  first, second = bits[:2] << np.uint64(32) | bits[2:]
  return int(first), int(second)


def generator(two_words: tuple[int, int]) -> np.random.Generator:
  """A generator that is a function of `words`."""
  philox = np.array(two_words, dtype=np.uint64)
  return np.random.Generator(np.random.Philox(key=philox))


def _uniform_set(
  draw: np.random.Generator, num_examples: int, size: int
) -> np.ndarray:
  drawn = draw.choice(num_examples, size, replace=False, shuffle=False)
  return np.sort(drawn).astype(np.int64)


def _check_not_empty(num_examples: int) -> None:
  if num_examples < 1:
    raise ValueError(f"num_examples={num_examples} must be >= 1.")
