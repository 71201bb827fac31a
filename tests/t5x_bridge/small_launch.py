"""A private launch of t5x that takes seconds: `t5x.train` on `small_run`'s run.

Also a program: `python small_launch.py MODEL_DIR 'OPTIONS AS JSON'`, so that a
test can kill it, give it devices, or start it several times as one job.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "training"))
if __name__ == "__main__":
  OPTIONS = json.loads(sys.argv[2])
  if devices := OPTIONS.pop("devices", None):
    os.environ["XLA_FLAGS"] = (
      f"--xla_force_host_platform_device_count={devices}"
    )

import jax
import numpy as np
import orbax.checkpoint as ocp
import small_run
from t5x import gin_utils
from t5x import partitioning
from t5x import train as t5x_train
from t5x import utils
from tensorboard.backend.event_processing import event_accumulator
import tensorflow as tf

from dptrain.t5x_bridge import initial_state
from dptrain.t5x_bridge import launch as launch_lib
from dptrain.t5x_bridge import models
from dptrain.t5x_bridge import optimizers
from dptrain.t5x_bridge import poisson_batches
from dptrain.t5x_bridge import trainer
from dptrain.t5x_bridge import validation
from dptrain.training import evaluation

TIMEOUT = 300


def make_run(model_dir, bert=None, **options):
  """`small_run.make_run`, evaluated when it is saved.

  `bert`: settings of a real Bert; None for a quick model.
  """
  period = options.setdefault("period", 2)
  options.setdefault(
    "evaluation", evaluation.EvaluationSettings(period, None, 16)
  )
  run = small_run.make_run(model_dir, **options)
  if bert is None:
    return run
  return dataclasses.replace(run, model=small_run.model(**bert))


def records(**options):
  return small_run.records(**options)


def partitioner(model_parallel=1):
  return partitioning.PjitPartitioner(
    num_partitions=None,
    model_parallel_submesh=(1, model_parallel, 1, 1),
    logical_axis_rules=partitioning.standard_logical_axis_rules(
      additional_rules=[(n, None) for n in ("positions", "clusters", "ngrams")]
    ),
  )


def train_dataset(run, **changes):
  return utils.DatasetConfig(
    **{
      "mixture_or_task_name": "records",
      "task_feature_lengths": {},
      "split": "train",
      "batch_size": run.physical_batch_size,
      "shuffle": False,
      "seed": None,
      "pack": False,
      **changes,
    }
  )


def arguments(launch, model_parallel=1, random_seed=0, **changes):
  """What gin would bind to `t5x.train.train`."""
  run = launch.run
  validated = run.validation_split is not None
  bound = {
    "model": models.MaskedLM(run.model, optimizers.PrivateOptimizer(launch)),
    "train_dataset_cfg": train_dataset(run),
    "train_eval_dataset_cfg": train_dataset(
      run, batch_size=16, split="validation"
    )
    if validated
    else None,
    "infer_eval_dataset_cfg": None,
    "checkpoint_cfg": utils.CheckpointConfig(
      restore=utils.RestoreCheckpointConfig(path=[]),
      save=utils.SaveCheckpointConfig(
        period=run.checkpoints.period,
        keep=run.checkpoints.keep,
        state_transformation_fns=[trainer.ReportOnSave(launch)],
      ),
    ),
    "partitioner": partitioner(model_parallel),
    "trainer_cls": functools.partial(trainer.PrivateTrainer, launch=launch),
    "model_dir": run.model_dir,
    "total_steps": launch.plan.num_steps,
    "eval_steps": 1,
    "eval_period": run.evaluation.period,
    "stats_period": run.checkpoints.period,
    "random_seed": random_seed,
    "summarize_config_fn": gin_utils.summarize_gin_config,
    "get_dataset_fn": functools.partial(
      poisson_batches.get_dataset, launch=launch
    ),
    "train_eval_get_dataset_fn": functools.partial(
      validation.get_datasets, masked=validation.of_launch(launch)
    )
    if validated
    else None,
    "train_state_initializer_cls": functools.partial(
      initial_state.SeededInitializer, launch=launch
    ),
  }
  return bound | changes


def train(
  model_dir, corpus=None, mesh=None, random_seed=0, changes=None, **options
):
  """Trains; `changes`: other arguments of `t5x.train.train`."""
  run = make_run(model_dir, **options)
  launch = launch_lib.Launch(run, records(**(corpus or {})))
  try:
    return t5x_train.train(
      **arguments(launch, mesh or 1, random_seed, **(changes or {}))
    )
  finally:
    launch.close()


def newest_state(model_dir):
  """(step, every array by name) of the newest checkpoint, without t5x."""
  folder = pathlib.Path(model_dir)
  step = max(int(path.name[11:]) for path in folder.glob("checkpoint_*[0-9]"))
  path = (folder / f"checkpoint_{step}" / "state").absolute()
  with ocp.PyTreeCheckpointer() as reader:
    # On this host, whatever devices they were saved from.
    here = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      reader.metadata(path).item_metadata.tree,
    )
    tree = reader.restore(path, restore_args=here)
  return step, dict(small_run._flat("", tree))


def params(state):
  return {
    name.removeprefix("/target/"): array
    for name, array in state.items()
    if name.startswith("/target/")
  }


def assert_same(one, other):
  """The final states and the ledgers of two MODEL_DIRs are bitwise equal."""
  (step, state), (other_step, other_state) = map(newest_state, (one, other))
  assert step == other_step
  assert state.keys() == other_state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(array, other_state[name], err_msg=name)
  assert small_run.ledger_bytes(one) == small_run.ledger_bytes(other)


def assert_close(one, other, atol=1e-5):
  """The final parameters and the releases of two MODEL_DIRs are equal."""
  (step, state), (other_step, other_state) = map(newest_state, (one, other))
  assert step == other_step
  for name, array in params(state).items():
    np.testing.assert_allclose(
      params(other_state)[name], array, rtol=0, atol=atol, err_msg=name
    )
  releases = [
    [
      (line["branch"], line["step"])
      for line in small_run.ledger_lines(directory, "release")
    ]
    for directory in (one, other)
  ]
  assert releases[0] == releases[1]


def told(directory):
  """The last figures that t5x wrote into a TensorBoard folder."""
  events = event_accumulator.EventAccumulator(str(directory))
  events.Reload()
  return {
    name: float(tf.make_ndarray(events.Tensors(name)[-1].tensor_proto))
    for name in ("accuracy", "loss")
  }


def start(directory, **options):
  return start_program(__file__, directory, json.dumps(options))


def start_program(program, *arguments):
  return subprocess.Popen(
    [sys.executable, program, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(*programs):
  """What each of the programs said; all must end well."""
  told = [program.communicate(timeout=TIMEOUT)[0] for program in programs]
  for program, text in zip(programs, told, strict=True):
    assert program.returncode == 0, text
  return told


def collectives(program):
  """Counts the exchanges between devices in a compiled program."""
  found = re.findall(
    r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute)(?:-start)?\(",
    program.as_text(),
  )
  return len(found)


def wait_for(program, condition):
  end = time.monotonic() + TIMEOUT
  while not condition():
    if program.poll() is not None or time.monotonic() > end:
      program.kill()
      raise AssertionError("".join(program.communicate()[0]))
    time.sleep(0.0005)


def num_releases(directory):
  path = directory / "privacy_ledger.jsonl"
  return path.read_bytes().count(b'"release"') if path.exists() else 0


class CountingTrainer(trainer.PrivateTrainer):
  """Prints what its programs exchange."""

  def compile_train(self, batch):
    super().compile_train(batch)
    programs = self._programs
    print(
      f"collectives: accumulate {collectives(programs.accumulate)},"
      f" finish {collectives(programs.finish)}"
    )


def main():
  process = OPTIONS.pop("process", None)
  if process is not None:
    jax.distributed.initialize(*process)
  trainer.PrivateTrainer = CountingTrainer
  train(sys.argv[1], **OPTIONS)


if __name__ == "__main__":
  main()
