"""Small TFDS datasets on disk, in the format of the large ones."""

import pathlib


def write(data_dir, name, splits, features=None, examples_per_shard=7):
  """Writes a dataset that `tfds.load(name, data_dir=data_dir)` reads.

  Args:
    data_dir: the folder of datasets.
    name: "name/config:version".
    splits: lists of examples (dicts) by the split's name.
    features: TFDS features by name; left out: all are Text.
    examples_per_shard: at most.

  Returns:
    The dataset's own folder.
  """
  from dptrain.data import seqio_import

  seqio_import.import_seqio()
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info
  from tensorflow_datasets.core import sequential_writer

  plain, _, version = name.partition(":")
  dataset, _, config = plain.partition("/")
  folder = pathlib.Path(data_dir) / plain / version
  folder.mkdir(parents=True)
  if features is None:
    first = next(iter(splits.values()))[0]
    features = {name: tfds.features.Text() for name in first}
  information = dataset_info.DatasetInfo(
    builder=dataset_info.DatasetIdentity(
      name=dataset,
      config_name=config,
      version=tfds.core.Version(version),
      data_dir=str(folder),
      module_name="",
    ),
    features=tfds.features.FeaturesDict(features),
  )
  writer = sequential_writer.SequentialWriter(information, examples_per_shard)
  writer.initialize_splits(list(splits))
  writer.add_examples(splits)
  writer.close_all()
  return folder
