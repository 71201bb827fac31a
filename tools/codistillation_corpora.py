"""What codistillation is studied on: corpora, and a model's size for each.

Shapes: N records, T length, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimizer_problems

from dptrain.data import masking
from dptrain.models import bert
from dptrain.models import losses
from dptrain.models import masked_lm
from dptrain.training import objective as objective_lib


@dataclasses.dataclass(frozen=True)
class Size:
  """Of a model: V, T, layers and width."""

  vocabulary: int
  length: int
  layers: int
  width: int

  def objective(self, entropy: float = 0.0) -> objective_lib.Objective:
    """Masked language modelling; `entropy`: of `losses.MinimumEntropy`."""
    encoder = bert.Bert(
      vocab_size=self.vocabulary,
      num_layers=self.layers,
      width=self.width,
      num_heads=self.width // 32,
      max_length=self.length,
    )
    loss: Any = losses.CrossEntropy()
    if entropy:
      loss = losses.MinimumEntropy(loss, entropy)
    model = masked_lm.MaskedLanguageModel(encoder, loss)
    return objective_lib.Objective(model, masking.MaskingSettings())


SYMBOLS, FIRST = 32, 5  # behind the special tokens
CERTAIN = 0.7
RECORDS, HELD_OUT = 400, 1024
DOCS = Size(optimizer_problems.VOCABULARY, optimizer_problems.LENGTH, 1, 32)
GENERATED = Size(SYMBOLS + FIRST, 16, 1, 64)


class Data(NamedTuple):
  """Records [N, T] in an order of no meaning, and a masked held-out batch."""

  size: Size
  train: jax.Array
  held_out: dict[str, jax.Array]


def docs() -> Data:
  """Python's documentation."""
  texts = optimizer_problems.python_docs(every=2)
  # Of all seeds: which records make a half.
  order = np.random.default_rng(5).permutation(len(texts.train))
  return _masked(DOCS, texts.train[order], texts.held_out)


def generated() -> Data:
  """Few records, in which most tokens follow from the one before them.

  A token is a fixed, random function of the one before it with probability
  `CERTAIN`, else any. Models soon memorise the rest: noise.
  """
  rng = np.random.default_rng(0)
  rule = rng.integers(0, SYMBOLS, SYMBOLS)
  count, length = HELD_OUT + RECORDS, GENERATED.length
  text = rng.integers(0, SYMBOLS, (count, length))
  for t in range(1, length):
    kept = rng.random(count) < CERTAIN
    text[:, t] = np.where(kept, rule[text[:, t - 1]], text[:, t])
  text = (text + FIRST).astype(np.int32)
  return _masked(GENERATED, text[HELD_OUT:], text[:HELD_OUT])


def _masked(size: Size, train: np.ndarray, held_out: np.ndarray) -> Data:
  key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 1)
  keys = jax.random.split(key, len(held_out))
  batch = {"tokens": jnp.asarray(held_out)}
  masked = jax.jit(size.objective().masked_for_teachers)(batch, keys)
  return Data(size, jnp.asarray(train), masked)
