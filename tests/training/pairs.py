"""Replicas of a small run that learn from each other, in one process."""

import threading

import small_run

from dptrain.data import disjoint_shards
from dptrain.models import distillation
from dptrain.privacy import keys
from dptrain.training import codistillation
from dptrain.training import loop


def make_run(folder, replica, *, replicas=2, corpora="shards", **options):
  """Replica number `replica`; its MODEL_DIR is folder/r0, r1, ...

  `exchanging` and `distilling`: options of `Codistillation`, `Distillation`.
  """
  exchanging = {
    "exchange": str(folder / "exchange"),
    "period": 1,
    "wait_seconds": 60.0,
    **options.pop("exchanging", {}),
  }
  shard = disjoint_shards.ShardSettings()
  if corpora == "shards":
    key_folder = folder / "key"
    shard = disjoint_shards.ShardSettings(replica, replicas, str(key_folder))
    if not (key_folder / "shard_key").exists():
      key_folder.mkdir(parents=True, exist_ok=True)
      (key_folder / "shard_key").touch(mode=0o600)
      (key_folder / "shard_key").write_text("5a" * 32)
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


def train(folder, replicas=2, each=(), corpora="shards", **options):
  """Trains all replicas, a thread each; results in their order.

  `each`: options of one replica, by its number.
  """
  results: dict = {}
  own = dict(enumerate(each))
  runs = [
    make_run(
      folder,
      number,
      replicas=replicas,
      corpora=corpora,
      **(options | own.get(number, {})),
    )
    for number in range(replicas)
  ]

  def work(number, run):
    try:
      corpus = small_run.records(
        seed=0 if corpora == "shards" else number, num_examples=200
      )
      results[number] = loop.train(run, corpus)
    except BaseException as error:
      results[number] = error

  threads = [
    threading.Thread(target=work, args=pair) for pair in enumerate(runs)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for result in results.values():
    if isinstance(result, BaseException):
      raise result
  return [results[number] for number in range(replicas)]


def seed(number):
  """The secret seed of a fixed number."""
  return keys.fixed_seed(number)
