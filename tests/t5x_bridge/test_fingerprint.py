"""Four words tell whether arrays are those that were saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.t5x_bridge.fingerprint import fingerprint

TREE = {
  "w": np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32),
  "b": np.zeros(7, np.float32),
  "half": np.ones(3, jnp.bfloat16),
  "count": np.int32(3),
  "flag": np.array([True, False]),
  "key": jax.random.key(0, impl="threefry2x32"),
}


def words(**changes):
  return tuple(np.asarray(jax.jit(fingerprint)(TREE | changes)).tolist())


def test_equal_arrays_have_equal_words():
  assert words() == words(w=TREE["w"].copy())
  assert len(words()) == 4


def flipped(bit):
  bits = TREE["w"].copy().view(np.uint32)
  bits[2, 3] ^= np.uint32(1) << np.uint32(bit)
  return bits.view(np.float32)


@pytest.mark.parametrize(
  "changes",
  [
    *({"w": flipped(bit)} for bit in (0, 15, 31)),
    {"w": TREE["w"][::-1]},
    {"w": TREE["w"].astype(jnp.bfloat16).astype(np.float32)},
    {"b": -TREE["b"]},  # minus zero
    {"half": np.array([1, 1, 1.0078125], jnp.bfloat16)},
    {"count": np.int32(4)},
    {"flag": np.array([False, True])},
    {"key": jax.random.key(1, impl="threefry2x32")},
  ],
)
def test_any_change_changes_them(changes):
  assert words(**changes) != words()


def test_arrays_that_change_places_change_them():
  one, other = np.float32([1, 2]), np.float32([3, 4])
  assert words(b=one, w=other) != words(b=other, w=one)
