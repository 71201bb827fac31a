"""Black-box attack: which canaries the final model has come to predict.

Shapes: m canaries, T sequence length.
"""

from typing import Any

import jax
import numpy as np

from dptrain.data import batches
from dptrain.data import masking
from dptrain.data import store as store_lib
from dptrain.training import preparation as preparation_lib

# Masks that a canary's loss is averaged over.
_ROUNDS = 8


def scores(
  prepared: preparation_lib.Preparation, params: Any, tokens: np.ndarray
) -> np.ndarray:
  """By how much each canary's loss fell, over the median of all canaries.

  A function of the final parameters, the initial ones and the canaries' text,
  whether or not a canary was in. Half of them were, so the median stands
  between.

  Args:
    prepared: of the audited run.
    params: its final parameters.
    tokens: int32 [m, T], the canaries' text.

  Returns:
    [m] float64.
  """
  before = prepared.initial_state()["params"]
  fallen = _losses(prepared, before, tokens) - _losses(prepared, params, tokens)
  return fallen - np.median(fallen)


def _losses(
  prepared: preparation_lib.Preparation, params: Any, tokens: np.ndarray
) -> np.ndarray:
  """Losses [m] in nats per masked token, under masks that never change."""
  objective = prepared.objective
  key = jax.random.key(20181011, impl="threefry2x32")

  @jax.jit
  def losses(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    keys = masking.example_keys(key, batch["example_ids"])
    return objective.model.losses(params, objective.mask(batch, keys))[0]

  params = jax.device_get(params)
  store = store_lib.RecordStore(tokens)
  size = min(prepared.batch["tokens"].shape[0], len(tokens))
  total = np.zeros(len(tokens))
  for number in range(_ROUNDS):
    for batch in batches.evaluation_batches(store, size):
      found = losses(params, batch, jax.random.fold_in(key, number))
      kept = ~batch["is_padding"]
      total[batch["example_ids"][kept]] += np.asarray(found)[kept]
  return total / _ROUNDS
