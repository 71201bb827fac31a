"""Sampled softmax: classes drawn near each hidden state stand for all.

Source: RF-softmax (arXiv 1907.10747). The Gaussian kernel of two unit vectors
is exp(scale * cosine) up to a constant, and random Fourier features make it an
inner product. Sums of features over the nodes of a binary tree with the classes
as leaves give the kernel's mass of any subtree, so a class is drawn in log2(V)
steps, and its probability is known exactly: it is the product of the branches
taken, whatever the features' error.

Shapes: B batch, M masked, D width, V vocabulary, F frequencies, K negatives.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dptrain.models import bert as bert_lib


@dataclasses.dataclass(frozen=True)
class SampledSoftmax:
  """Trains on each label and K drawn classes instead of the vocabulary.

  A drawn class counts 1 / (K q) times, with q its probability, and a drawn
  label not at all, so the sum of exponentials has the right expectation; its
  logarithm, the loss, comes near cross-entropy as K grows. Gradient reaches the
  drawn rows of the table and no other.

  Draws depend on the example's own key and hidden state, on the parameters and
  on frequencies that are public constants: no example's draws tell of another.
  They are a part of the example's loss, whose gradient is clipped whole.

  Attributes:
    num_negatives: K, at each masked position.
    num_features: F; the kernel's error falls as 1 / sqrt(2 F), and a class is
      never taken to have less mass than that.
    bandwidth: the kernel is exp(-bandwidth / 2 * squared distance); at
      `Bert.logit_scale` it is that of the softmax, but the features are truer
      for smaller ones.
  """

  num_negatives: int
  num_features: int = 256
  bandwidth: float = 4.0

  def __post_init__(self) -> None:
    for name in ("num_negatives", "num_features"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
          f"SampledSoftmax.{name}={value!r} must be a positive int"
        )
    if isinstance(self.bandwidth, bool) or not 0.0 < self.bandwidth < math.inf:
      raise ValueError(
        f"SampledSoftmax.bandwidth={self.bandwidth!r} must be positive and"
        " finite, such as 4"
      )

  def read_out(
    self, labels: jax.Array, key: jax.Array, logit_scale: float
  ) -> bert_lib.ReadOut:
    """What `Bert` makes of the hidden states of one example.

    Args:
      labels: [1, M] int32.
      key: the example's own.
      logit_scale: of the model.

    Returns:
      A function to `Bert`'s `read_out` whose results are logits [1, M, 1 + K],
      the label's first, and log weights of that shape (`losses.PositionLoss`).
    """

    def scores(
      x: jax.Array, tokens: nn.Embed, bias: bert_lib.OutputBias
    ) -> tuple[jax.Array, jax.Array]:
      # Behind stop_gradient: a use of the table that clipping need not count.
      table = jax.lax.stop_gradient(tokens.embedding)
      levels = self.tree(table)
      drawn, log_probs = self.draw(key, jax.lax.stop_gradient(x[0]), levels)
      drawn, log_probs = drawn[None], log_probs[None]
      ids = jnp.concatenate([labels[..., None], drawn], axis=-1)
      rows = bert_lib.unit(tokens(ids))
      cosines = jnp.einsum("bmd,bmkd->bmk", bert_lib.unit(x), rows)
      counts = -log_probs - math.log(self.num_negatives)
      counts = jnp.where(drawn == labels[..., None], -jnp.inf, counts)
      log_weights = jnp.pad(counts, [(0, 0), (0, 0), (1, 0)])
      return bias(logit_scale * cosines, ids), log_weights

    return scores

  def features(self, x: jax.Array) -> jax.Array:
    """Fourier features [..., 2 F] of the directions of vectors [..., D]."""
    # Public: one fixed generator, whatever the process's default.
    key = jax.random.key(1907_10747, impl="threefry2x32")
    shape = (x.shape[-1], self.num_features)
    frequencies = math.sqrt(self.bandwidth) * jax.random.normal(key, shape)
    angles = bert_lib.unit(x) @ frequencies
    both = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return both / math.sqrt(self.num_features)

  def tree(self, table: jax.Array) -> list[tuple[jax.Array, np.ndarray]]:
    """Sums of features below each node, from the root's children to the leaves.

    Args:
      table: [V, D] embeddings.

    Returns:
      For each level of n nodes, features [n / 2, 2, 2 F] and numbers of classes
      [n / 2, 2], siblings side by side.
    """
    size = table.shape[0]
    depth = max(1, math.ceil(math.log2(size)))
    sums = jnp.pad(self.features(table), [(0, 2**depth - size), (0, 0)])
    counts = (np.arange(2**depth) < size).astype(np.float32)
    levels = []
    for _ in range(depth):
      pairs, numbers = (
        sums.reshape(-1, 2, sums.shape[-1]),
        counts.reshape(-1, 2),
      )
      levels.append((pairs, numbers))
      sums, counts = pairs.sum(axis=1), numbers.sum(axis=1)
    return levels[::-1]

  def draw(
    self,
    key: jax.Array,
    hidden: jax.Array,
    levels: Sequence[tuple[jax.Array, Any]],
  ) -> tuple[jax.Array, jax.Array]:
    """Draws classes with replacement, by descending the tree.

    Args:
      key: the example's own.
      hidden: [M, D].
      levels: what `tree` returned.

    Returns:
      Classes [M, K] int32, and the logarithms of their probabilities.
    """
    queries = self.features(hidden)
    least = 1.0 / math.sqrt(2 * self.num_features)
    shape = hidden.shape[0], self.num_negatives
    draws = jax.random.uniform(key, (len(levels), *shape))
    node, log_probs = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    for (sums, counts), draw in zip(levels, draws, strict=True):
      found = jnp.einsum("mkcw,mw->mkc", sums[node], queries)
      left, right = jnp.moveaxis(
        jnp.maximum(found, least * jnp.asarray(counts)[node]), -1, 0
      )
      total = left + right
      # Rounding must not lead to where no class is.
      goes_right = (draw * total >= left) & (right > 0)
      log_probs += jnp.log(jnp.where(goes_right, right, left) / total)
      node = 2 * node + goes_right
    return node, log_probs
