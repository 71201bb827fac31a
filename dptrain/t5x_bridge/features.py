"""Masked records as a t5x model's features, with explicit loss weights.

seqio's own encoder converter would give loss only where the input is the mask
token, and so none to the tokens that BERT's masking keeps or replaces.

Shapes: T length, M masked.
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

_SPEC = seqio.FeatureConverter.FeatureSpec


class MaskedFeatures(seqio.FeatureConverter):
  """From a task's masked records to what `MaskedLM` reads; refuses to pack.

  A task has "inputs" [T] (tokens, masked), "positions" [M] into T, "targets"
  [M], the true tokens there, and "loss_weights" [M], 0 for unused slots.
  """

  TASK_FEATURES = {  # noqa: RUF012, seqio's interface
    "inputs": _SPEC(dtype=tf.int32),
    "positions": _SPEC(dtype=tf.int32),
    "targets": _SPEC(dtype=tf.int32),
    "loss_weights": _SPEC(dtype=tf.float32),
  }
  MODEL_FEATURES = {  # noqa: RUF012
    "inputs": _SPEC(dtype=tf.int32),
    "positions": _SPEC(dtype=tf.int32),
    "labels": _SPEC(dtype=tf.int32),
    "weights": _SPEC(dtype=tf.float32),
  }
  PACKING_FEATURE_DTYPES = None

  def __init__(self, pack: bool = False, **settings: Any):
    """As seqio's, but `pack` must be False."""
    if pack:
      raise ValueError(
        "DatasetConfig.pack=True would join several records into one example"
        " and break the privacy unit: bind pack = False."
      )
    super().__init__(pack=False, **settings)

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """Lengths of the model's features."""
    lengths = task_feature_lengths
    return {
      "inputs": lengths["inputs"],
      "positions": lengths["positions"],
      "labels": lengths["targets"],
      "weights": lengths["loss_weights"],
    }

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    del task_feature_lengths
    return ds.map(
      lambda example: {
        "inputs": example["inputs"],
        "positions": example["positions"],
        "labels": example["targets"],
        "weights": example["loss_weights"],
      },
      num_parallel_calls=tf.data.AUTOTUNE,
    )
