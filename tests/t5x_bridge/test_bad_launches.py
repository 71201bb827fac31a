"""Bad input under t5x: one clear error each, before anything is spent."""

import sys

import numpy as np
import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch
import small_run
import t5x.trainer
import t5x.utils
import tensorflow as tf

from dptrain.privacy import ledger as ledger_lib
from dptrain.t5x_bridge import features
from dptrain.t5x_bridge import installation
from dptrain.t5x_bridge import launch as launch_lib
from dptrain.t5x_bridge import models
from dptrain.t5x_bridge import optimizers
from dptrain.training import public_data


def refused(directory, error, match, changes=None, **options):
  """Launches; nothing may be released."""
  with pytest.raises(error, match=match):
    small_launch.train(directory, changes=changes, **options)
  assert not small_run.ledger_lines(directory, "release")


def changed_dataset(**changes):
  run = small_launch.make_run("unused")
  return {"train_dataset_cfg": small_launch.train_dataset(run, **changes)}


def test_packing(tmp_path):
  changes = changed_dataset(pack=True)
  refused(tmp_path, ValueError, "pack=True would join several", changes)
  with pytest.raises(ValueError, match="bind pack = False"):
    features.MaskedFeatures(pack=True)


def test_public_records(tmp_path):
  run = small_run.make_run(
    tmp_path, public_data=public_data.PublicData(task="public")
  )
  with pytest.raises(ValueError, match="takes no part under t5x"):
    launch_lib.Launch(run, small_run.records())
  assert not list(tmp_path.iterdir())


def test_another_batch_size(tmp_path):
  changes = changed_dataset(batch_size=8)
  refused(tmp_path, ValueError, "batch_size=8, but", changes)


def test_a_stock_dataset(tmp_path):
  def stock(*_, **__):
    shapes = small_launch.make_run("unused")
    row = {
      "tokens": np.zeros((16, shapes.sequence_length), np.int32),
      "example_ids": np.zeros(16, np.int32),
      "is_padding": np.zeros(16, bool),
    }
    return tf.data.Dataset.from_tensors(row).repeat()

  changes = {"get_dataset_fn": stock}
  refused(tmp_path, ValueError, "which are no Poisson samples", changes)


def test_a_stock_dataset_of_other_features(tmp_path):
  def stock(*_, **__):
    row = {"inputs": np.zeros((16, 4), np.int32)}
    return tf.data.Dataset.from_tensors(row).repeat()

  changes = {"get_dataset_fn": stock}
  refused(tmp_path, ValueError, r"has the features \['inputs'\]", changes)


def test_another_optimizer(tmp_path):
  run = small_launch.make_run("unused")
  model = models.MaskedLM(run.model, optimizers.OptaxWrapper(run.optimizer))
  refused(tmp_path, ValueError, "keeps no ledger", {"model": model})


def test_another_trainer(tmp_path):
  changes = {
    "trainer_cls": lambda **settings: t5x.trainer.Trainer(
      learning_rate_fn=lambda step: 0.0, num_microbatches=None, **settings
    )
  }
  refused(tmp_path, ValueError, "MaskedLM.loss_fn is for evaluation", changes)


def test_periods_that_lose_updates(tmp_path):
  evaluation = small_launch.evaluation.EvaluationSettings(3, None, 16)
  with pytest.raises(ValueError, match="is not a multiple of"):
    small_launch.train(tmp_path, evaluation=evaluation)
  with pytest.raises(ValueError, match="it must be at least 1"):
    small_launch.train(tmp_path, period=0)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"noise": 5.0}, "noise_multiplier was 4.0 and is now 5.0"),
    ({"fixed_seed": 8}, "the secret seed is another one"),
  ],
)
def test_another_plan_than_the_checkpoint(copy, options, match):
  before = small_run.ledger_bytes(copy)
  with pytest.raises(ledger_lib.LedgerError, match=match):
    small_launch.train(copy, **options)
  assert small_run.ledger_bytes(copy) == before


def test_checkpoints_without_a_ledger(copy):
  (copy / ledger_lib.LEDGER_FILE).unlink()
  with pytest.raises(ledger_lib.LedgerError, match="checkpoints but no ledger"):
    small_launch.train(copy)


def test_a_ledger_that_was_rolled_back(copy):
  path = copy / ledger_lib.LEDGER_FILE
  path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))
  with pytest.raises(ledger_lib.LedgerError, match="was rolled back"):
    small_launch.train(copy)


def test_t5x_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "t5x.trainer", None)
  with pytest.raises(ImportError, match=r"needs t5x\.trainer, which cannot"):
    installation.check()


def test_t5x_is_too_old(monkeypatch):
  monkeypatch.delattr(t5x.utils, "TrainStateInitializer")
  with pytest.raises(ImportError, match=r"needs t5x.utils.TrainStateInit.*old"):
    installation.check()
