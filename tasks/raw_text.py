"""Registers a seqio task of raw documents.

A corpus is a function from a split's name to (source, text) pairs, or to
(source, text, document, unit); this module turns it into a seqio task whose
examples hold the scalar string features that `dptrain.data.corpus` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import hashlib
from typing import Any, Final

from dptrain.data import seqio_import

TRAIN: Final = "train"
VALIDATION: Final = "validation"
FEATURES: Final = ("source", "text", "document", "unit")


def add_task(
  name: str,
  documents: Callable[[str], Iterable[tuple[str, ...]]],
  splits: Sequence[str] = (TRAIN, VALIDATION),
) -> str:
  """Adds a task of raw documents to seqio's registry.

  A task already registered under the name is replaced. The registry sees it
  when documents are next read: until then seqio need not be imported.

  Args:
    name: the task's name: letters, digits, "_", ".", ":" and "#".
    documents: called with a split's name when a dataset of it is opened;
      returns pairs (source, text), or quadruples with the keys of document and
      unit behind, that can be iterated over more than once. What the call
      raises reaches the reader unchanged.
    splits: the names of the splits.

  Returns:
    `name`.
  """
  return add_source(name, lambda: _function_source(documents, splits))


def add_source(name: str, make_source: Callable[[], Any]) -> str:
  """Adds a task of raw documents from a seqio source, as `add_task` does.

  Args:
    name: the task's name.
    make_source: called when seqio is imported; returns a `seqio.DataSource`
      whose examples hold the scalar strings "source", "text", "document" and
      "unit".

  Returns:
    `name`.
  """
  seqio_import.when_seqio_is_needed(lambda: _add(name, make_source()))
  return name


def _add(name: str, source: Any) -> None:
  """Adds the task to seqio's registry."""
  seqio = seqio_import.import_seqio()
  string = seqio.Feature(
    vocabulary=seqio.PassThroughVocabulary(size=0),
    add_eos=False,
    dtype=seqio_import.import_tensorflow().string,
    rank=0,
  )
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[],
    output_features=dict.fromkeys(FEATURES, string),
  )


def _function_source(
  documents: Callable[[str], Iterable[tuple[str, ...]]], splits: Sequence[str]
) -> Any:
  """A seqio source of what a Python function returns."""
  seqio = seqio_import.import_seqio()
  tensorflow = seqio_import.import_tensorflow()

  def dataset(split: str, shuffle_files: bool = False) -> Any:
    del shuffle_files  # One stream: there are no shards to shuffle.
    pairs = documents(split)
    scalar = tensorflow.TensorSpec((), tensorflow.string)
    return tensorflow.data.Dataset.from_generator(
      lambda: _examples(pairs),
      output_signature=dict.fromkeys(FEATURES, scalar),
    )

  return seqio.FunctionDataSource(dataset, splits=splits)


def stable_fraction(key: str) -> float:
  """Maps a string to [0, 1) uniformly, the same on every machine and run.

  Args:
    key: any string.

  Returns:
    The first 53 bits of the key's SHA-256 as a fraction.

  >>> stable_fraction("argparse") == stable_fraction("argparse")
  True
  """
  digest = hashlib.sha256(key.encode("utf-8", errors="replace")).digest()
  return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _examples(
  pairs: Iterable[tuple[str, ...]],
) -> Iterator[dict[str, bytes]]:
  """Turns documents into seqio examples."""
  for values in pairs:
    told = dict(zip(FEATURES, (*values, "", ""), strict=False))
    # Python strings may hold lone surrogates, which UTF-8 cannot.
    yield {
      name: value.encode("utf-8", errors="replace")
      for name, value in told.items()
    }
