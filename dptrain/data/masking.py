"""BERT masking inside the jitted step, drawn anew at every use.

Source: Devlin et al., "BERT", arXiv 1810.04805, section 3.1 (15 % of the
tokens; of these 80 % [MASK], 10 % random, 10 % unchanged); drawn anew as in
Liu et al., "RoBERTa", arXiv 1907.11692, section 4.1.

Letters: B batch, T sequence length, M slots for masked positions.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from dptrain.data.special_tokens import MASK_ID
from dptrain.data.special_tokens import NUM_SPECIAL


@dataclasses.dataclass(frozen=True)
class MaskingSettings:
  """How much to mask, and with what.

  Attributes:
    mask_rate: share of a record's ordinary tokens to predict, in (0, 1].
    max_masked: M, the most positions to predict in one record; None for
      `mask_rate` times the sequence length, rounded up.
    replace_with_mask: share of the chosen positions that become [MASK].
    replace_with_random: share that becomes a random ordinary token. The rest
      keeps its token and is predicted all the same.

  Raises:
    ValueError: if a setting is out of range.
  """

  mask_rate: float = 0.15
  max_masked: int | None = None
  replace_with_mask: float = 0.8
  replace_with_random: float = 0.1

  def __post_init__(self) -> None:
    if not 0 < self.mask_rate <= 1:
      raise ValueError(
        f"mask_rate={self.mask_rate} must lie in (0, 1]; BERT uses 0.15"
      )
    if self.max_masked is not None and self.max_masked < 1:
      raise ValueError(
        f"max_masked={self.max_masked} must be at least 1; leave it None for "
        "mask_rate times the sequence length"
      )
    shares = self.replace_with_mask, self.replace_with_random
    # A little slack: 0.7 + 0.2 + 0.1 exceeds 1 in floating point.
    if min(shares) < 0 or sum(shares) > 1 + 1e-9:
      raise ValueError(
        f"replace_with_mask={shares[0]} and replace_with_random={shares[1]} "
        "must be at least 0 and sum to at most 1; BERT uses 0.8 and 0.1"
      )

  def num_slots(self, sequence_length: int) -> int:
    """Number of masked positions that a record of this length has room for.

    Args:
      sequence_length: T.

    Returns:
      M.
    """
    if self.max_masked is not None:
      return min(self.max_masked, sequence_length)
    # Rounded first: 0.07 * 100 is a little more than 7 in floating point.
    return math.ceil(round(self.mask_rate * sequence_length, 6))


def example_keys(step_key: jax.Array, example_ids: jax.Array) -> jax.Array:
  """Derives one key per example from the step's key.

  Args:
    step_key: typed PRNG key [], itself a function of seed and step.
    example_ids: int32 [B], each record's index in the store.

  Returns:
    Typed PRNG keys [B]; each depends on the step's key and its own id alone.
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, example_ids)


def mask_batch(
  keys: jax.Array,
  tokens: jax.Array,
  settings: MaskingSettings,
  vocab_size: int,
) -> dict[str, jax.Array]:
  """Masks a batch; jit-able, with static shapes.

  Positions are drawn uniformly without replacement among the ordinary tokens:
  special tokens, [UNK] included, are never masked and never predicted. Of e
  ordinary tokens, clip(round(mask_rate * e), 1, M) are chosen; of none, none.
  What an example becomes depends on its key and its tokens alone, never on its
  place in the batch or the batch's size.

  Args:
    keys: typed threefry PRNG keys [B], one per example.
    tokens: int32 [B, T].
    settings: the settings.
    vocab_size: number of tokens, special ones included.

  Returns:
    `inputs` int32 [B, T], the tokens with the chosen ones replaced;
    `positions` int32 [B, M], where they stand; `labels` int32 [B, M], the
    tokens that stood there; `weights` float32 [B, M], 1 for a chosen position,
    kept and random ones included, and 0 for a slot left over, whose position
    and label are 0.

  Raises:
    ValueError: if the vocabulary has no ordinary token, or the keys belong to
      a generator other than threefry.
  """
  if vocab_size <= NUM_SPECIAL:
    raise ValueError(
      f"vocab_size={vocab_size} leaves no ordinary token beside the "
      f"{NUM_SPECIAL} special ones"
    )
  # Under vmap the other generators mix the examples' draws (JAX's own rule).
  if str(jax.random.key_impl(keys)) != "threefry2x32":
    raise ValueError(
      f"masking needs threefry2x32 keys, not {jax.random.key_impl(keys)}: only "
      "these draw the same for an example wherever it stands in the batch; "
      "use jax.random.key(seed, impl='threefry2x32')"
    )

  def mask_one(key: jax.Array, row: jax.Array) -> dict[str, jax.Array]:
    return _mask_example(key, row, settings, vocab_size)

  return jax.vmap(mask_one)(keys, tokens)


def _mask_example(
  key: jax.Array, tokens: jax.Array, settings: MaskingSettings, vocab_size: int
) -> dict[str, jax.Array]:
  """Masks one example: key [], tokens [T]."""
  (length,) = tokens.shape
  slots = settings.num_slots(length)
  position_key, action_key, random_key = jax.random.split(key, 3)

  eligible = tokens >= NUM_SPECIAL
  # The slots with the highest tickets win; 0 is a blank, so that every
  # ordinary token comes before every special one.
  tickets = (jax.random.bits(position_key, (length,), jnp.uint32) >> 1) + 1
  _, positions = jax.lax.top_k(jnp.where(eligible, tickets, 0), slots)

  available = jnp.sum(eligible)
  count = jnp.round(settings.mask_rate * available).astype(jnp.int32)
  count = jnp.minimum(jnp.clip(count, 1, slots), available)
  chosen = jnp.arange(slots) < count

  labels = tokens[positions]
  action = jax.random.uniform(action_key, (slots,))
  random_tokens = jax.random.randint(
    random_key, (slots,), NUM_SPECIAL, vocab_size, tokens.dtype
  )
  to_mask = action < settings.replace_with_mask
  to_random = action < settings.replace_with_mask + settings.replace_with_random
  replaced = jnp.where(
    to_mask, MASK_ID, jnp.where(to_random, random_tokens, labels)
  )
  # A slot left over points past the end, where the scatter drops it.
  inputs = tokens.at[jnp.where(chosen, positions, length)].set(
    replaced.astype(tokens.dtype), mode="drop"
  )
  return {
    "inputs": inputs,
    "positions": jnp.where(chosen, positions, 0).astype(jnp.int32),
    "labels": jnp.where(chosen, labels, 0),
    "weights": chosen.astype(jnp.float32),
  }
