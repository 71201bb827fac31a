"""Masking: BERT's proportions, and each example on its own."""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.data.masking import MaskingSettings
from dptrain.data.masking import example_keys
from dptrain.data.masking import mask_batch
from dptrain.data.special_tokens import MASK_ID
from dptrain.data.special_tokens import NUM_SPECIAL
from dptrain.data.special_tokens import UNK_ID

VOCAB = 44


def step_key(seed: int = 0) -> jax.Array:
  return jax.random.key(seed, impl="threefry2x32")


@functools.cache
def jitted(masking: MaskingSettings):
  return jax.jit(
    functools.partial(mask_batch, settings=masking, vocab_size=VOCAB)
  )


def records(batch: int, length: int, seed: int = 0) -> np.ndarray:
  """Rows of random tokens with padding of random length; some hold [UNK]."""
  draws = np.random.default_rng(seed)
  rows = draws.integers(NUM_SPECIAL, VOCAB, (batch, length), dtype=np.int32)
  rows[draws.random(rows.shape) < 0.05] = UNK_ID
  for row, used in zip(rows, draws.integers(2, length + 1, batch), strict=True):
    row[0], row[used - 1], row[used:] = 2, 3, 0
  return rows


def mask(tokens, seed=0, masking=None, ids=None):
  ids = np.arange(len(tokens), dtype=np.int32) if ids is None else ids
  keys = example_keys(step_key(seed), jnp.asarray(ids))
  masked = jitted(masking or MaskingSettings())(keys, jnp.asarray(tokens))
  return {name: np.asarray(value) for name, value in masked.items()}


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1),
  masking=st.sampled_from(
    [
      MaskingSettings(),
      MaskingSettings(mask_rate=0.5, max_masked=6),
      MaskingSettings(mask_rate=1.0),
      MaskingSettings(max_masked=500),
    ]
  ),
)
def test_what_holds_for_every_draw(seed, masking):
  length = 24
  tokens = records(6, length, seed)
  out = mask(tokens, seed, masking)
  slots = masking.num_slots(length)
  shapes = {name: (each.shape, each.dtype) for name, each in out.items()}
  assert shapes == {
    "inputs": ((6, length), np.int32),
    "positions": ((6, slots), np.int32),
    "labels": ((6, slots), np.int32),
    "weights": ((6, slots), np.float32),
  }
  for i, row in enumerate(tokens):
    eligible = np.sum(row >= NUM_SPECIAL)
    wanted = np.rint(np.float32(masking.mask_rate) * np.float32(eligible))
    count = int(min(np.clip(wanted, 1, slots), eligible))
    np.testing.assert_array_equal(out["weights"][i], np.arange(slots) < count)
    positions = out["positions"][i, :count]
    assert len(set(positions)) == count
    assert np.all(row[positions] >= NUM_SPECIAL)
    np.testing.assert_array_equal(out["labels"][i, :count], row[positions])
    assert not out["positions"][i, count:].any()
    assert not out["labels"][i, count:].any()
    untouched = np.setdiff1d(np.arange(length), positions)
    np.testing.assert_array_equal(out["inputs"][i, untouched], row[untouched])
    replaced = out["inputs"][i, positions]
    assert np.all((replaced == MASK_ID) | (replaced >= NUM_SPECIAL))
    assert np.all(replaced < VOCAB)


def test_an_example_does_not_see_its_batch():
  tokens = records(16, 40)
  ids = np.arange(100, 116, dtype=np.int32)
  whole = mask(tokens, ids=ids)
  order = np.random.default_rng(1).permutation(16)
  shuffled = mask(tokens[order], ids=ids[order])
  # Another neighbour must change nothing either.
  alone = [mask(tokens[i : i + 1], ids=ids[i : i + 1]) for i in range(16)]
  for name, value in whole.items():
    np.testing.assert_array_equal(shuffled[name], value[order])
    np.testing.assert_array_equal(
      np.concatenate([each[name] for each in alone]), value
    )


def test_masking_is_fresh_each_step_and_repeatable():
  tokens = np.tile(records(1, 40), (8, 1))
  first, again, later = mask(tokens, 1), mask(tokens, 1), mask(tokens, 2)
  for name, value in first.items():
    np.testing.assert_array_equal(again[name], value)
  assert np.any(first["positions"] != later["positions"])
  assert len({row.tobytes() for row in first["inputs"]}) > 1


def test_jit_changes_nothing():
  tokens = jnp.asarray(records(4, 24))
  keys = example_keys(step_key(), jnp.arange(4))
  eager = mask_batch(keys, tokens, MaskingSettings(), VOCAB)
  for name, value in mask(tokens).items():
    np.testing.assert_array_equal(value, eager[name])


def chi_square_is_plausible(observed, expected) -> bool:
  """Tells whether Pearson's statistic lies within 5 standard deviations."""
  observed, expected = np.asarray(observed), np.asarray(expected)
  statistic = np.sum((observed - expected) ** 2 / expected)
  freedom = len(observed) - 1
  return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_proportions():
  batch, length = 3000, 42
  # Even ids only: a random odd token is then certain to be a random one.
  draws = np.random.default_rng(3)
  tokens = 6 + 2 * draws.integers(0, 19, (batch, length), dtype=np.int32)
  tokens[:, 0], tokens[:, -1] = 2, 3
  out = mask(tokens)
  slots = out["positions"].shape[1]
  # round(0.15 * 40) of ceil(0.15 * 42) slots.
  assert (slots, out["weights"].sum()) == (7, 6 * batch)

  positions = out["positions"][:, :6]
  replaced = np.take_along_axis(out["inputs"], positions, axis=1)
  labels = out["labels"][:, :6]
  total = positions.size
  assert chi_square_is_plausible(
    np.bincount(positions.ravel(), minlength=length)[1:-1],
    np.full(40, total / 40),
  )
  # A random token equals the one it replaces once in VOCAB - NUM_SPECIAL.
  luck = 0.1 / (VOCAB - NUM_SPECIAL)
  masked, kept = replaced == MASK_ID, replaced == labels
  observed = [masked.sum(), kept.sum(), (~masked & ~kept).sum()]
  expected = total * np.array([0.8, 0.1 + luck, 0.1 - luck])
  assert chi_square_is_plausible(observed, expected)
  odd = replaced[replaced % 2 == 1]
  assert chi_square_is_plausible(
    np.bincount(odd, minlength=VOCAB)[NUM_SPECIAL::2],
    np.full(20, odd.size / 20),
  )


def test_nothing_to_mask():
  tokens = np.zeros((2, 16), np.int32)
  tokens[1, :3] = 2, UNK_ID, 3
  out = mask(tokens)
  np.testing.assert_array_equal(out["inputs"], tokens)
  assert not out["weights"].any()


@pytest.mark.parametrize(
  ("masking", "length", "slots"),
  [
    (MaskingSettings(), 128, 20),
    (MaskingSettings(mask_rate=0.07), 100, 7),
    (MaskingSettings(max_masked=9), 128, 9),
    (MaskingSettings(max_masked=200), 128, 128),
  ],
)
def test_num_slots(masking, length, slots):
  assert masking.num_slots(length) == slots


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"mask_rate": 0.0}, r"mask_rate=0\.0"),
    ({"mask_rate": 1.5}, r"mask_rate=1\.5"),
    ({"max_masked": 0}, "max_masked=0"),
    ({"replace_with_mask": 0.95}, r"replace_with_mask=0\.95"),
    ({"replace_with_random": -0.1}, r"replace_with_random=-0\.1"),
  ],
)
def test_settings_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=message):
    MaskingSettings(**arguments)


def test_bad_arguments():
  tokens = jnp.zeros((1, 8), jnp.int32)
  keys = example_keys(step_key(), jnp.arange(1))
  with pytest.raises(ValueError, match="vocab_size=5 leaves no ordinary"):
    mask_batch(keys, tokens, MaskingSettings(), 5)
  other = example_keys(jax.random.key(0, impl="rbg"), jnp.arange(1))
  with pytest.raises(ValueError, match="threefry2x32 keys, not rbg"):
    mask_batch(other, tokens, MaskingSettings(), VOCAB)
