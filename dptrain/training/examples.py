"""What is sampled: the records of a corpus, or its documents or users."""

import numpy as np

from dptrain.data import store as store_lib
from dptrain.data import units
from dptrain.privacy import keys as keys_lib
from dptrain.training import run as run_lib


def of_run(
  run: run_lib.TrainingRun,
  records: store_lib.Store,
  validation: store_lib.Store | None,
  seed: keys_lib.SecretSeed,
) -> store_lib.Examples:
  """The examples of a run, with the contribution of each unit bounded.

  Formal guarantee: unit: that of `PrivacySettings.unit`. An example is a
  function of one unit and of the secret seed; a unit has one example, or, with
  `unit_sampling` "records", at most `records_per_unit`.

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
    return records
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
  if privacy.unit_sampling == "records":
    return records.subset(units.kept(own, privacy.records_per_unit, choice))
  return units.by_unit(records, own, privacy.records_per_unit, choice)


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
