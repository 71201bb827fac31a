"""t5x's own evaluation tells the numbers of the thin loop's evaluator."""

import functools
import json

import jax
import numpy as np
import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import seqio
import small_launch
from t5x import eval as t5x_eval
from t5x import trainer as t5x_trainer
from t5x import utils

from dptrain.t5x_bridge import models
from dptrain.t5x_bridge import validation
from dptrain.training import evaluation
from dptrain.training import objective


@pytest.fixture
def evaluator(launched):
  run = small_launch.make_run(launched)
  return run, evaluation.Evaluator(
    objective.Objective(run.model, run.masking),
    small_launch.records().validation,
    run.evaluation,
  )


def nested(flat):
  tree = {}
  for name, array in flat.items():
    *path, last = name.split("/")
    place = tree
    for part in path:
      place = place.setdefault(part, {})
    place[last] = array
  return tree


def test_evaluation_during_and_after_training(launched, evaluator, tmp_path):
  run, thin = evaluator
  _, state = small_launch.newest_state(launched)
  expected = thin.evaluate(nested(small_launch.params(state)))
  expected = {"accuracy": expected.accuracy, "loss": expected.loss}

  during = small_launch.told(launched / "training_eval" / validation.NAME)
  assert during == pytest.approx(expected, rel=1e-5)

  masked = validation.joined(thin)
  config = small_launch.train_dataset(
    run,
    mixture_or_task_name=validation.register(masked),
    task_feature_lengths=None,
    split="validation",
  )
  t5x_eval.evaluate(
    model=models.MaskedLM(run.model),
    dataset_cfg=config,
    restore_checkpoint_cfg=utils.RestoreCheckpointConfig(
      path=str(launched), mode="latest"
    ),
    partitioner=small_launch.partitioner(),
    output_dir=str(tmp_path),
    inference_evaluator_cls=functools.partial(
      seqio.Evaluator,
      logger_cls=[seqio.TensorBoardLogger, seqio.JSONLogger],
    ),
    training_evaluator_cls=t5x_trainer.Trainer,
    train_eval_get_dataset_fn=functools.partial(
      validation.get_datasets, masked=masked
    ),
  )
  after = small_launch.told(tmp_path / "training_eval" / validation.NAME)
  assert after == pytest.approx(during, rel=1e-6)
  path = tmp_path / "inference_eval" / f"{validation.NAME}-metrics.jsonl"
  (line,) = path.read_text().splitlines()
  scored = json.loads(line)
  assert scored["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-5)
  assert scored["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_predictions_are_the_likeliest_tokens():
  run = small_launch.make_run("unused", bert={})
  model = models.MaskedLM(run.model)
  params = jax.jit(run.model.init)(jax.random.key(0))
  batch = {
    "inputs": np.arange(5, 21, dtype=np.int32)[None],
    "positions": np.array([[1, 2]], np.int32),
  }
  tokens, aux = jax.jit(model.predict_batch_with_aux)(params, batch)
  logits = jax.jit(run.model.bert.apply)(
    {"params": params}, batch["inputs"], batch["positions"]
  )
  np.testing.assert_array_equal(tokens, np.argmax(logits, -1))
  assert aux["scores"].shape == (1, 2)


def test_every_validation_record_counts_once():
  masked = {
    "inputs": np.ones((5, 3), np.int32),
    "weights": np.ones((5, 2), np.float32),
  }
  shards = [validation.MaskedBatches(masked, 4, index, 2) for index in (0, 1)]
  parts = [list(shard) for shard in shards]
  assert [len(part) for part in parts] == [2, 2]
  total = sum(batch["weights"].sum() for part in parts for batch in part)
  assert total == 10
  assert shards[0].element_spec["inputs"].shape == (2, 3)
