"""Poisson sampling as a pure function of a key.

There is no state to restore and no host to agree with: whoever holds the key of
a step draws the same sample.
"""

import jax
import numpy as np


def poisson_sample(
  key: jax.Array, num_examples: int, sampling_prob: float
) -> np.ndarray:
  """Draws each of `num_examples` examples independently.

  The size is binomial and, given its size, the set is uniform: that is equal in
  law to one coin of bias `sampling_prob` per example. Nothing is shuffled,
  truncated or filled up.

  Formal guarantee: unit: one example (index). Every example is included
  independently with the same probability, which is public; what an attacker
  must not know is `key`. This is the sampling that `PoissonSampledDpEvent` of
  dp-accounting prices.

  Args:
    key: typed threefry key, used for nothing else.
    num_examples: corpus size N, public.
    sampling_prob: in [0, 1].

  Returns:
    Sorted distinct indices, int64 [k], k ~ Binomial(N, sampling_prob).

  Raises:
    ValueError: for a probability outside [0, 1] or an empty corpus.
  """
  if num_examples < 1:
    raise ValueError(f"num_examples={num_examples} must be >= 1.")
  if not 0.0 <= sampling_prob <= 1.0:
    raise ValueError(f"sampling_prob={sampling_prob} must lie in [0, 1].")
  words = np.asarray(jax.random.bits(key, (4,), "uint32"), dtype=np.uint64)
  philox = words[:2] << np.uint64(32) | words[2:]
  generator = np.random.Generator(np.random.Philox(key=philox))
  size = generator.binomial(num_examples, sampling_prob)
  drawn = generator.choice(num_examples, size, replace=False, shuffle=False)
  return np.sort(drawn).astype(np.int64)
