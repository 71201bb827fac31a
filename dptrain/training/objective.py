"""What is trained: masking and model joined into per-example losses.

Shapes: B batch, k records of one unit, T length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.data import masking
from dptrain.data import special_tokens
from dptrain.models import masked_lm

# A model may know examples by their numbers, and learns from teachers.
_PASSED_ON = ("example_ids", "targets")


@dataclasses.dataclass(frozen=True)
class Objective:
  """Masked language modelling on raw token records.

  Attributes:
    model: encoder and per-example loss.
    masking: what is masked, and with what.
  """

  model: masked_lm.MaskedLanguageModel
  masking: masking.MaskingSettings

  def mask(self, batch: Any, keys: jax.Array) -> dict[str, jax.Array]:
    """Masks "tokens" [B, T] under one key per example."""
    return masking.mask_batch(
      keys, batch["tokens"], self.masking, self.model.bert.vocab_size
    )

  def losses(
    self, params: Any, batch: Any, keys: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Per-example losses under fresh masks and dropout.

    Args:
      params: of the model.
      batch: "tokens" [B, T] int32, or [B, k, T] where an example is a unit of k
        records at most, others being all padding; "example_ids" [B] int32, if
        there, is passed on to the model, which may know some examples by their
        numbers (an audit's canaries); "targets" (`distillation.Targets`), if
        there, with logits [B, M, V], or [B, k, M, V] for units, are what
        teachers predict; other entries are not read.
      keys: typed PRNG keys [B]; entry i of the result depends on row i and key
        i only.

    Returns:
      Losses [B] and a dictionary of [B] arrays, see
      `masked_lm.MaskedLanguageModel.losses`.
    """
    if batch["tokens"].ndim == 3:
      return self._losses_of_units(params, batch, keys)
    pairs = jax.vmap(jax.random.split)(keys)
    masked = self.mask(batch, pairs[:, 0])
    for name in _PASSED_ON:
      if name in batch:
        masked[name] = batch[name]
    return self.model.losses(params, masked, pairs[:, 1])

  def masked_for_teachers(self, batch: Any, keys: jax.Array) -> Any:
    """The inputs under the very masks that `losses` draws.

    Args:
      batch: as there.
      keys: as there.

    Returns:
      What `MaskedLanguageModel.logits` reads, of B rows, or of B k rows where
      an example is a unit of k records.
    """
    if batch["tokens"].ndim == 3:
      batch, keys = _flat(batch, keys)
    return self.mask(batch, jax.vmap(jax.random.split)(keys)[:, 0])

  def _losses_of_units(
    self, params: Any, batch: Any, keys: jax.Array
  ) -> tuple[jax.Array, Any]:
    """As `losses`; a unit's loss is the mean over its records."""
    tokens = batch["tokens"]
    units, size, _ = tokens.shape
    losses, aux = self.losses(params, *_flat(batch, keys))
    there = jnp.any(tokens != special_tokens.PAD_ID, axis=-1)
    count = jnp.maximum(jnp.sum(there, axis=-1), 1)
    means = jnp.sum(losses.reshape(units, size) * there, axis=-1) / count
    sums = jax.tree.map(lambda x: x.reshape(units, size).sum(axis=-1), aux)
    return means, sums


def _flat(batch: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
  """Units [B, k, ...] as B k records, with a key for each."""
  units, size, length = batch["tokens"].shape
  keys = jax.vmap(lambda key: jax.random.split(key, size))(keys)
  flat = {"tokens": batch["tokens"].reshape(units * size, length)}
  if "example_ids" in batch:
    flat["example_ids"] = jnp.repeat(batch["example_ids"], size)
  if "targets" in batch:
    targets = batch["targets"]
    flat["targets"] = dataclasses.replace(
      targets,
      logits=targets.logits.reshape(units * size, *targets.logits.shape[2:]),
      weight=jnp.repeat(targets.weight, size),
    )
  return flat, keys.reshape(units * size)
