"""What is sampled: the records of a corpus, or its documents or users."""

import pathlib
from typing import Any

import numpy as np

from dptrain.data import disjoint_shards
from dptrain.data import store as store_lib
from dptrain.data import units
from dptrain.privacy import keys as keys_lib
from dptrain.training import run as run_lib

_KEY_FILE = "shard_key"


def of_run(
  run: run_lib.TrainingRun,
  records: store_lib.Store,
  validation: store_lib.Store | None,
  seed: keys_lib.SecretSeed,
) -> store_lib.Examples:
  """The examples of a run, with the contribution of each unit bounded.

  Formal guarantee: unit: that of `PrivacySettings.unit`. An example is a
  function of one unit and of the secret seed; a unit has one example, or, with
  `unit_sampling` "records", at most `records_per_unit`. Of a corpus that is
  shared by several runs, only this run's units take part
  (`disjoint_shards.own_records`).

  Args:
    run: the user's settings.
    records: the training records.
    validation: the validation records.
    seed: of the run; chooses which records of a large unit are kept.

  Returns:
    What sampler and batches read.

  Raises:
    ValueError: the corpus does not tell the units, or a unit has records in
      both splits.
  """
  privacy = run.privacy
  if privacy.unit == "record":
    if run.shard.count == 1:
      return records
    return records.subset(_own_records(run, records, None))
  own = _keys(records, privacy.unit, run.train_split)
  if validation is not None:
    others = _keys(validation, privacy.unit, str(run.validation_split))
    both = len(np.intersect1d(own, others))
    if both:
      raise ValueError(
        f"{both} {privacy.unit}(s) have records in both splits,"
        f" {run.train_split!r} and {run.validation_split!r}: exact figures on"
        " the latter would tell about units that training protects. Split the"
        f" task by {privacy.unit} (split_by of its register), or set"
        " TrainingRun.validation_split=None."
      )
  choice = seed.digest("kept records")
  limit = privacy.records_per_unit
  here = _own_records(run, records, own)
  if privacy.unit_sampling == "records":
    return records.subset(here[units.kept(own[here], limit, choice)])
  found = units.by_unit(records, own[here], limit, choice)
  if run.shard.count == 1:
    return found
  there = np.where(found.members >= 0, here[found.members], -1)
  return units.UnitStore(records, there)


def shard(
  run: run_lib.TrainingRun, records: store_lib.Store
) -> dict[str, Any] | None:
  """Which shard of which corpus a run trains on, as its ledger tells it.

  Two runs that tell the same but for the index share no unit.

  Args:
    run: the user's settings.
    records: the training records, of all shards.

  Returns:
    Plain data; None for a run on the whole corpus.
  """
  if run.shard.count == 1:
    return None
  key = _hash_key(run)
  # Keyed: without the key nobody can try whether a corpus is this one.
  corpus = key.fingerprint(records.content_digest())
  identity = key.digest("identity").hex()
  by = run.privacy.unit
  moving = run.privacy.relation == disjoint_shards.NUMBERS_MOVE
  if by == "record":
    by += "'s content" if moving else "'s number"
  elif by == "document" and moving:
    by += "'s content"
  return disjoint_shards.described(run.shard, corpus, identity, by)


def _hash_key(run: run_lib.TrainingRun) -> keys_lib.SecretSeed:
  folder = pathlib.Path(str(run.shard.key_folder)).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"ShardSettings.key_folder={run.shard.key_folder!r} cannot be made"
      f" ({error.strerror}): name a folder that can be written to, the same for"
      " all runs that share the corpus."
    ) from error
  danger = "tell which records each run has read"
  return keys_lib.load_or_create(folder, _KEY_FILE, danger)


def _own_records(
  run: run_lib.TrainingRun, records: store_lib.Store, keys: units.Keys | None
) -> np.ndarray:
  if run.shard.count == 1:
    return np.arange(records.num_examples)
  return disjoint_shards.own_records(
    run.shard,
    records,
    keys,
    run.privacy.relation,
    _hash_key(run).digest("shards"),
    # Of a task that does not name its documents, they are their numbers.
    keys_may_move=run.privacy.unit == "document",
  )


def _keys(records: store_lib.Store, unit: str, split: str) -> units.Keys:
  keys = records.users if unit == "user" else records.documents
  if keys is None:
    missing = "unit" if unit == "user" else "document"
    raise ValueError(
      f"PrivacySettings.unit={unit!r}, but the corpus does not tell to which"
      f" {unit} each text of split {split!r} belongs: give the task a feature"
      f" {missing!r} in every example, or use unit='record'."
    )
  return keys
