"""`dptrain codistill` of small runs: one program, launcher and replicas alike.

`--gin.OPTIONS="{...}"` has options of `small_run.make_run`, and beside them:
  pause: seconds after each update.
  die: [replica, step]: it is killed after so many updates, once.
"""

import ast
import os
import pathlib
import signal
import sys
import time
from unittest import mock

import small_run

from dptrain.data import disjoint_shards
from dptrain.models import distillation
from dptrain.training import codistillation
from dptrain.training import progress
from dptrain.training import records as records_lib

PROGRAM = (sys.executable, str(pathlib.Path(__file__)))


def training_run(files, bindings, search_paths=".", defaults=()):
  """What gin would make of codistill/shards.gin and a small run's file."""
  bound = {}
  for binding in bindings:
    name, _, value = binding.partition(" = ")
    try:
      bound[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      bound[name] = value
  number, count = bound["REPLICA"], bound["REPLICAS"]
  options = dict(bound.get("OPTIONS", {}))
  _behave(number, options, pathlib.Path(bound["MODEL_DIR"]))
  return small_run.make_run(
    bound["MODEL_DIR"],
    shard=disjoint_shards.ShardSettings(number, count, bound["KEY_FOLDER"]),
    codistillation=codistillation.Codistillation(
      replicas=count, replica=number, exchange=bound["EXCHANGE"], period=2
    ),
    distillation=distillation.Distillation(),
    sizes=(10, 20),
    **{"fixed_seed": None, "steps": 12, **options},
  )


def _behave(number, options, folder):
  pause, die = options.pop("pause", 0.0), options.pop("die", [None, None])
  step, advance = 0, progress.Progress.advance

  def slow(self, size):
    nonlocal step
    advance(self, size)
    step += 1
    time.sleep(pause)
    mark = folder.parent / "died_once"
    if die == [number, step] and not mark.exists():
      mark.touch()
      os.kill(os.getpid(), signal.SIGKILL)

  if IS_REPLICA:
    progress.Progress.advance = slow


def main():
  from dptrain import cli
  from dptrain import configuration
  from dptrain import replicas

  with (
    mock.patch.object(replicas, "PROGRAM", PROGRAM),
    mock.patch.object(configuration, "training_run", training_run),
    mock.patch.object(
      records_lib, "read_records", return_value=small_run.records()
    ),
  ):
    return cli.main(sys.argv[1:])


IS_REPLICA = "train" in sys.argv
if __name__ == "__main__":
  sys.exit(main())
