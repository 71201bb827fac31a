"""What is trained: masking and model joined into per-example losses.

Shapes: B batch, T length.
"""

import dataclasses
from typing import Any

import jax

from dptrain.data import masking
from dptrain.models import masked_lm


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
      batch: "tokens" [B, T] int32; "example_ids" [B] int32, if there, is passed
        on to the model, which may know some examples by their numbers (an
        audit's canaries); other entries are not read.
      keys: typed PRNG keys [B]; entry i of the result depends on row i and key
        i only.

    Returns:
      Losses [B] and a dictionary of [B] arrays, see
      `masked_lm.MaskedLanguageModel.losses`.
    """
    pairs = jax.vmap(jax.random.split)(keys)
    masked = self.mask(batch, pairs[:, 0])
    if "example_ids" in batch:
      masked["example_ids"] = batch["example_ids"]
    return self.model.losses(params, masked, pairs[:, 1])
