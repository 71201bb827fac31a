"""Datasets of TFDS that hold text, such as wikipedia and c4, as seqio tasks.

They are read from where TFDS has put them. Nothing is downloaded or generated.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import hashlib
import os
from typing import Any

from dptrain.data import seqio_import
from dptrain.tasks import dividing
from dptrain.tasks import raw_text
from dptrain.tasks import tables


def register(
  name: str,
  *,
  data_dir: str | None = None,
  text_feature: str = "text",
  unit_feature: str | None = None,
  document_feature: str | None = None,
  unit_pattern: str | None = None,
  validation_fraction: float | None = None,
  split_by: str = "record",
  train_split: str = "train",
  validation_split: str = "validation",
) -> str:
  """Registers a TFDS dataset that is on disk as a seqio task.

  Its description and the names of its files are checked at once; texts are read
  when they are asked for. Without `document_feature` each example is a document
  of its own.

  Args:
    name: as TFDS writes it: "wikipedia/20230601.en:1.0.0". Without a version,
      the newest on disk is taken.
    data_dir: where TFDS has put it; None: TFDS_DATA_DIR of the environment, or
      ~/tensorflow_datasets.
    text_feature: the feature with the text, one string.
    unit_feature: the feature that names the user, a string or a whole number;
      None if users are not known. For PrivacySettings.unit="user".
    document_feature: likewise for the document: "title" in wikipedia, "url" in
      c4.
    unit_pattern: a regular expression with one group that finds the user in
      `unit_feature`, such as the site in an address; None: all of it.
    validation_fraction: None: the dataset's own `validation_split`. Else both
      splits come from `train_split`: validation holds each document (or user,
      by `split_by`) whose stable hash is under this share, in [0, 1). At 0 the
      task has no validation split.
    split_by: "record", "document" or "user": what is in one split with all its
      text, if
      `validation_fraction` is given.
    train_split: the dataset's name of it.
    validation_split: the dataset's name of it.

  Returns:
    The task's name, a function of the arguments and the version found.

  Raises:
    ValueError: if an argument is out of range; if the dataset is not there, or
      lacks a split or a feature, or has another kind of feature.
    FileNotFoundError: if one of the dataset's files is missing.
  """
  settings = _Dataset(
    name=name,
    data_dir=data_dir,
    text=text_feature,
    unit=unit_feature,
    document=document_feature,
    unit_pattern=unit_pattern,
    validation_fraction=validation_fraction,
    split_by=split_by,
    train_split=train_split,
    validation_split=validation_split,
  )
  builder = _builder(settings)
  splits = _splits(settings, builder)
  _check_files(builder, splits)
  _check_features(settings, builder)
  settings = dataclasses.replace(settings, name=builder.info.full_name)
  digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:10]
  return raw_text.add_source(
    f"dptrain_tfds_{digest}",
    lambda: _source(settings, os.fspath(builder.data_dir), splits),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dataset:
  """`register`'s arguments."""

  name: str
  data_dir: str | None
  text: str
  unit: str | None
  document: str | None
  unit_pattern: str | None
  validation_fraction: float | None
  split_by: str
  train_split: str
  validation_split: str

  def __post_init__(self) -> None:
    if self.validation_fraction is not None:
      dividing.check_fraction(self.validation_fraction)
    way_out = "unit_feature, the feature that names the user"
    dividing.check_split_by(self.split_by, self.unit, way_out)
    dividing.check_pattern("unit_pattern", self.unit_pattern)
    if self.unit_pattern is not None and self.unit is None:
      raise ValueError(f"unit_pattern={self.unit_pattern!r} needs {way_out}")
    if self.data_dir is not None and "://" not in self.data_dir:
      folder = os.path.abspath(os.path.expanduser(self.data_dir))
      object.__setattr__(self, "data_dir", folder)


def _builder(settings: _Dataset) -> Any:
  """Opens the dataset's description, without the code that generates it."""
  seqio_import.import_seqio()
  import tensorflow_datasets as tfds

  folder = settings.data_dir or str(tfds.core.constants.DATA_DIR)
  try:
    # Not tfds.builder or tfds.load: these would turn to the network.
    return tfds.core.read_only_builder.builder_from_files(
      settings.name, data_dir=os.path.expanduser(folder)
    )
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    plain = settings.name.partition(":")[0]
    raise ValueError(
      f"no TFDS dataset {settings.name!r} in data_dir={folder} (it holds"
      f" {tables.listed(sorted(_present(folder)))}). dptrain downloads nothing:"
      " name one of these by --gin.TFDS_NAME, name the right folder by"
      " --gin.TFDS_DATA_DIR, or generate it where there is a network: tfds"
      f" build {plain} --data_dir={folder}"
    ) from error


def _present(folder: str) -> Iterator[str]:
  """Yields the names of the datasets below a local folder."""
  folder = os.path.expanduser(folder)
  for root, folders, files in os.walk(folder):
    parts = os.path.relpath(root, folder).split(os.sep)
    if "features.json" in files and len(parts) > 1:
      yield f"{'/'.join(parts[:-1])}:{parts[-1]}"
    if len(parts) == 3 or "features.json" in files:
      folders.clear()


def _splits(settings: _Dataset, builder: Any) -> dict[str, str]:
  """The task's splits, and those of the dataset that they are read from."""
  there = list(builder.info.splits)
  splits = {raw_text.TRAIN: settings.train_split}
  if settings.validation_fraction is None:
    splits[raw_text.VALIDATION] = settings.validation_split
  elif settings.validation_fraction:
    splits[raw_text.VALIDATION] = settings.train_split
  for split, own in splits.items():
    if own not in there:
      also = (
        ", or hold out a part of the training split by validation_fraction"
        " (--gin.VALIDATION_FRACTION=0.01)"
        if split == raw_text.VALIDATION
        else ""
      )
      raise ValueError(
        f"TFDS dataset {builder.info.full_name!r} has no split {own!r} (it has"
        f" {tables.listed(there)}): name the right one by"
        f" tfds_text.register.{split}_split{also}"
      )
  return splits


def _check_files(builder: Any, splits: dict[str, str]) -> None:
  for own in dict.fromkeys(splits.values()):
    for path in builder.info.splits[own].filepaths:
      if not path.exists():
        raise FileNotFoundError(
          f"{path} is missing, a file of split {own!r} of TFDS dataset"
          f" {builder.info.full_name!r}: copy it there, or generate the dataset"
          " again"
        )


def _check_features(settings: _Dataset, builder: Any) -> None:
  """Refuses features that are missing or of another kind."""
  there = dict(builder.info.features.items())
  texts = [name for name, each in there.items() if _kind(each) == "string"]
  for kind, name in _named(settings).items():
    if name is None:
      continue
    way_out = (
      f"name the right one by {kind}_feature (--gin.{kind.upper()}_FEATURE=...)"
    )
    if name not in there:
      raise ValueError(
        f"TFDS dataset {builder.info.full_name!r} has no feature {name!r} (it"
        f" has {tables.listed(list(there))}): {way_out}"
      )
    kinds = ("string",) if kind == "text" else ("string", "integer")
    if _kind(there[name]) not in kinds:
      raise ValueError(
        f"feature {name!r} of TFDS dataset {builder.info.full_name!r} is"
        f" {there[name]}, not one {' or '.join(kinds)} (strings are"
        f" {tables.listed(texts)}): {way_out}"
      )


def _named(settings: _Dataset) -> dict[str, str | None]:
  return {
    "text": settings.text,
    "unit": settings.unit,
    "document": settings.document,
  }


def _kind(feature: Any) -> str:
  """Whether a feature is one string, one integer or something else."""
  tensorflow = seqio_import.import_tensorflow()
  spec = feature.get_tensor_spec()
  if not isinstance(spec, tensorflow.TensorSpec) or spec.shape.rank != 0:
    return "else"
  if spec.dtype == tensorflow.string:
    return "string"
  return "integer" if spec.dtype.is_integer else "else"


def _source(settings: _Dataset, folder: str, splits: dict[str, str]) -> Any:
  """A seqio source of the dataset, with the features that units need."""
  seqio = seqio_import.import_seqio()

  class _Divided(seqio.TfdsDataSource):
    """Reads a dataset's split, and keeps what is of the task's."""

    def get_dataset(
      self, split: str | None = None, *arguments: Any, **more: Any
    ) -> Any:
      split = split or raw_text.TRAIN
      examples = super().get_dataset(split, *arguments, **more)
      return _told(settings, examples, split, splits[split])

  # Without a name, seqio opens the folder as it is: no code, no network.
  return _Divided(tfds_data_dir=folder, splits=splits, read_only=True)


def _told(settings: _Dataset, examples: Any, split: str, own: str) -> Any:
  """Names what examples tell, and leaves out those of the other split."""
  tensorflow = seqio_import.import_tensorflow()
  by_hash = settings.validation_fraction is not None
  division = dividing.Division(settings.validation_fraction or 0.0)
  prefix = f"{settings.name}:{own}:"

  def judged(source: bytes, document: bytes, unit: bytes) -> Any:
    """The user, and whether the example is of this split."""
    user = _user(settings, unit, source.decode())
    whole = {
      "record": source.decode(),
      "document": _decoded(document),
      "user": user,
    }
    fraction = raw_text.stable_fraction(whole[settings.split_by])
    found = division.is_validation(fraction)
    kept = not by_hash or found == (split == raw_text.VALIDATION)
    return user.encode(errors="surrogateescape"), kept

  def named(position: Any, example: Any) -> dict[str, Any]:
    strings = tensorflow.strings
    source = strings.join([prefix, strings.as_string(position)])
    told = {"source": source, "document": source, "unit": "", "keep": True}
    for kind, name in _named(settings).items():
      if name is not None:
        value = example[name]
        is_text = value.dtype == tensorflow.string
        told[kind] = value if is_text else strings.as_string(value)
    empty = strings.length(told["document"]) == 0
    told["document"] = tensorflow.where(empty, source, told["document"])
    if by_hash or settings.unit is not None:
      # Python is slow here: some 0.05 ms for each example.
      told["unit"], told["keep"] = tensorflow.numpy_function(
        judged,
        [told["source"], told["document"], told["unit"]],
        [tensorflow.string, tensorflow.bool],
      )
    return {
      key: tensorflow.ensure_shape(value, ()) for key, value in told.items()
    }

  kept = examples.enumerate().map(named).filter(lambda told: told["keep"])
  return kept.map(lambda told: {name: told[name] for name in raw_text.FEATURES})


def _decoded(key: bytes) -> str:
  # Bytes that are no text still tell units apart.
  return key.decode(errors="surrogateescape")


def _user(settings: _Dataset, unit: bytes, where: str) -> str:
  if settings.unit is None:
    return ""
  told = f"feature {settings.unit!r} of {where}"
  if not unit:
    raise ValueError(
      f"{told} is empty and names no user: leave such examples out of the"
      " dataset, or do without unit_feature"
    )
  if settings.unit_pattern is None:
    return _decoded(unit)
  return dividing.found_user(
    "unit_pattern", settings.unit_pattern, _decoded(unit), told
  )
