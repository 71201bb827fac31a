"""Masks: fresh at each update, equal in a replay and in any batch."""

import jax
import numpy as np
import small_run

from dptrain.data import masking
from dptrain.privacy import keys as keys_lib
from dptrain.training import objective as objective_lib


def objective(**settings):
  model = small_run.model(**settings)
  return objective_lib.Objective(model, masking.MaskingSettings())


def keys_of(step, branch="b", count=32):
  key = keys_lib.fixed_seed(1).key("examples", branch, step)
  return masking.example_keys(key, np.arange(count, dtype=np.int32))


def masks(step, branch="b"):
  batch = {"tokens": small_run.store(32).tokens}
  masked = objective().mask(batch, keys_of(step, branch))
  return np.asarray(masked["inputs"])


def test_masks_are_fresh_at_each_update_and_equal_in_a_replay():
  np.testing.assert_array_equal(masks(3), masks(3))
  for other in (masks(4), masks(3, "another branch")):
    same = (masks(3) == other).all(axis=1)
    assert same.mean() < 0.3


def test_losses_are_fresh_too_and_dropout_has_keys_of_its_own():
  batch = {"tokens": small_run.store(32).tokens}
  found = {}
  for rate in (0.0, 0.5):
    made = objective(dropout_rate=rate)
    params = jax.jit(made.model.init)(jax.random.key(0, impl="threefry2x32"))
    losses = jax.jit(made.losses)
    found[rate] = [
      np.asarray(losses(params, batch, keys_of(step))[0]) for step in (0, 0, 1)
    ]
    np.testing.assert_array_equal(found[rate][0], found[rate][1])
    assert (found[rate][0] != found[rate][2]).mean() > 0.9
  # The same masks under both rates: dropout does not disturb their keys.
  assert (found[0.0][0] != found[0.5][0]).mean() > 0.9


def test_a_loss_depends_on_its_own_row_and_key_alone():
  made = objective(dropout_rate=0.3)
  params = jax.jit(made.model.init)(jax.random.key(0, impl="threefry2x32"))
  tokens = small_run.store(8).tokens
  keys = keys_of(0, count=8)
  losses = jax.jit(made.losses)
  whole, _ = losses(params, {"tokens": tokens}, keys)
  rows = np.asarray([7, 2, 5])
  part, _ = losses(params, {"tokens": tokens[rows]}, keys[rows])
  np.testing.assert_allclose(part, whole[rows], rtol=1e-5)
