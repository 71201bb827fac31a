"""Replicas of a small run that learn from each other.

Also a program: `python pairs.py FOLDER 'OPTIONS AS JSON'` is one replica.
"""

import contextlib
import json
import pathlib
import sys
from unittest import mock

import small_run

from dptrain.data import disjoint_shards
from dptrain.models import distillation
from dptrain.training import codistillation
from dptrain.training import loop
from dptrain.training import records as records_lib

KEY = "5a" * 32


def make_run(folder, replica, *, replicas=2, corpora="shards", **options):
  """Replica number `replica`; its MODEL_DIR is folder/r0, r1, ...

  `exchanging` and `distilling`: options of `Codistillation`, `Distillation`.
  """
  folder = pathlib.Path(folder)
  exchanging = {
    "exchange": str(folder / "exchange"),
    "period": 1,
    **options.pop("exchanging", {}),
  }
  shard = disjoint_shards.ShardSettings()
  if corpora == "shards":
    key_folder = folder / "key"
    shard = disjoint_shards.ShardSettings(replica, replicas, str(key_folder))
    key_folder.mkdir(parents=True, exist_ok=True)
    key = key_folder / "shard_key"
    if not key.exists():
      key.touch(mode=0o600)
      key.write_text(KEY)
  return small_run.make_run(
    options.pop("model_dir", folder / f"r{replica}"),
    shard=options.pop("shard", shard),
    codistillation=codistillation.Codistillation(
      replicas=replicas, replica=replica, corpora=corpora, **exchanging
    ),
    distillation=distillation.Distillation(**options.pop("distilling", {})),
    fixed_seed=options.pop("fixed_seed", 100 + replica),
    sizes=options.pop("sizes", (10, 20)),
    **options,
  )


def train_in_step(runs, records):
  """Trains replicas of one process that look at the same moments."""
  results = {}
  with contextlib.ExitStack() as stack:
    rounds = {
      number: loop.begin(stack, run, own).rounds()
      for number, (run, own) in enumerate(zip(runs, records, strict=True))
    }
    while rounds:
      for number in list(rounds):
        try:
          next(rounds[number])
        except StopIteration as end:
          results[number] = end.value
          del rounds[number]
  return [results[number] for number in range(len(runs))]


def lessons(model_dir):
  """[(update, [(teacher, its updates, fingerprint), ...]), ...]."""
  return [
    (
      line["step"],
      [
        (each["name"], each["step"], each["fingerprint"])
        for each in line["teachers"]
      ],
    )
    for line in small_run.ledger_lines(model_dir, "lesson")
  ]


def main():
  from dptrain import cli
  from dptrain import configuration

  options = json.loads(sys.argv[2])
  run = make_run(sys.argv[1], options.pop("replica"), **options)
  with (
    mock.patch.object(configuration, "training_run", return_value=run),
    mock.patch.object(
      records_lib,
      "read_records",
      return_value=small_run.records(validation=False),
    ),
  ):
    return cli.main(["train"])


if __name__ == "__main__":
  sys.exit(main())
