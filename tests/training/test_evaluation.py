"""Evaluation: what counts, the constant guess, and masks that never change."""

import dataclasses

import jax
import numpy as np
import pytest
import small_run

from dptrain.data import masking
from dptrain.data import store as store_lib
from dptrain.models import losses
from dptrain.training import evaluation
from dptrain.training import objective as objective_lib


def evaluator(store, mask_rate=0.15, **settings):
  model = small_run.model()
  objective = objective_lib.Objective(
    model, masking.MaskingSettings(mask_rate=mask_rate)
  )
  made = evaluation.Evaluator(
    objective, store, evaluation.EvaluationSettings(**settings)
  )
  return made, jax.jit(model.init)(jax.random.key(0, impl="threefry2x32"))


def hand_made():
  """5 records of 14 ordinary tokens: 7 at 3/5 of the places, 8 elsewhere."""
  tokens = np.full((5, 16), 8, np.int32)
  tokens[:3] = 7
  tokens[:, 0], tokens[:, -1] = 2, 3
  return store_lib.RecordStore(tokens)


def test_the_constant_guess_on_a_hand_made_store():
  # Everything is masked, so that the counts are known; 2 padding rows.
  made, params = evaluator(hand_made(), 1.0, physical_batch_size=7)
  found = made.evaluate(params)
  assert found.num_tokens == 5 * 14
  assert found.baseline_accuracy == pytest.approx(3 / 5)
  assert found.loss == pytest.approx(np.log(small_run.VOCABULARY), rel=0.05)


def test_accuracy_of_a_model_that_always_guesses_the_same():
  made, params = evaluator(hand_made(), 1.0)
  params = jax.tree.map(np.zeros_like, params)
  for token, expected in ((7, 3 / 5), (8, 2 / 5), (9, 0.0)):
    params["output_bias"]["bias"][:] = 0
    params["output_bias"]["bias"][token] = 5.0
    assert made.evaluate(params).accuracy == pytest.approx(expected)


def test_batches_and_padding_change_nothing():
  store = small_run.store(30)
  made, params = evaluator(store, physical_batch_size=30)
  expected = made.evaluate(params)
  for size in (8, 64):
    made, _ = evaluator(store, physical_batch_size=size)
    found = made.evaluate(params)
    assert found.num_tokens == expected.num_tokens
    assert found.baseline_accuracy == expected.baseline_accuracy
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_whatever_is_trained_cross_entropy_is_told():
  store = small_run.store(10)
  plain, params = evaluator(store)
  objective = objective_lib.Objective(
    dataclasses.replace(
      small_run.model(),
      loss=losses.MinimumEntropy(losses.BiTempered(0.5, 1.5), 0.3),
    ),
    masking.MaskingSettings(mask_rate=0.15),
  )
  other = evaluation.Evaluator(
    objective, store, evaluation.EvaluationSettings()
  )
  assert other.evaluate(params) == plain.evaluate(params)


def test_masks_are_fixed():
  store = small_run.store(30)
  first, params = evaluator(store)
  second, _ = evaluator(store)
  assert first.evaluate(params) == first.evaluate(params)
  assert first.evaluate(params) == second.evaluate(params)


def test_max_records():
  made, params = evaluator(hand_made(), 1.0, max_records=2)
  assert made.evaluate(params).num_tokens == 2 * 14


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("period", -1),
    ("max_records", 0),
    ("physical_batch_size", 0),
    ("physical_batch_size", 8.0),
  ],
)
def test_refuses_settings_out_of_range(name, value):
  with pytest.raises(ValueError, match=f"EvaluationSettings.{name}="):
    evaluation.EvaluationSettings(**{name: value})
