"""Reading raw documents from seqio's registry of tasks and mixtures."""

from __future__ import annotations

from collections.abc import Iterator
import difflib
import re
from typing import Any, NamedTuple

from dptrain.data.seqio_import import import_seqio
from dptrain.data.seqio_import import import_tensorflow


class Document(NamedTuple):
  """One document: text that records never reach across.

  Attributes:
    source: where the text comes from; names it in messages.
    text: the text itself.
    document: key of the document that it belongs to, if that is larger (a file
      that was cut into passages, say); empty: it is one of its own.
    unit: key of the user (the author, say) that it belongs to; empty if none is
      known.
  """

  source: str
  text: str
  document: str = ""
  unit: str = ""


# Features that an example may have beside "text".
_OPTIONAL = ("source", "document", "unit")
# TensorFlow hands on what Python raised as a text, with its traceback.
_RAISED = re.compile(r"\w+(?:Error|Exception): (.*?)\nTraceback ", re.DOTALL)
_NODES = re.compile(r"\{\{.*?\}\} |\[\[?\{.*|\[Op:.*")


def read_documents(
  task: str, split: str, encoding_errors: str = "strict"
) -> Iterator[Document]:
  """Reads the documents of a registered seqio task or mixture.

  Any task serves whose examples carry a scalar string feature "text"; scalar
  string features "source", "document" and "unit" are optional: see `Document`.
  Documents come unshuffled, each once. Of a mixture every task that has the
  split is read whole, one after another: sampling by the mixture's rates would
  let one document decide whether another takes part, which the privacy analysis
  excludes.

  Args:
    task: the name of the task or mixture.
    split: the name of the split, for instance "train".
    encoding_errors: "strict" refuses a text that is not UTF-8; "replace" reads
      what is wrong in it as U+FFFD.

  Returns:
    An iterator over the documents.

  Raises:
    ValueError: at once if no such task is registered, if it lacks the split, or
      if it has no "text" feature; on the first `next` if the split holds no
      document; while reading if a text is not UTF-8, or the task's source
      fails.
  """
  if encoding_errors not in ("strict", "replace"):
    raise ValueError(
      f"encoding_errors={encoding_errors!r} must be 'strict' or 'replace'"
    )
  providers = _providers(task, split)
  datasets = [(name, _dataset(name, each, split)) for name, each in providers]
  return _documents(task, split, datasets, encoding_errors)


def _providers(task: str, split: str) -> list[tuple[str, Any]]:
  """Looks up (name, seqio task) pairs that hold `split`."""
  seqio = import_seqio()
  tasks, mixtures = seqio.TaskRegistry, seqio.MixtureRegistry
  if task in mixtures.names():
    provider = mixtures.get(task)
    members = [(each.name, each) for each in provider.tasks]
  elif task in tasks.names():
    provider = tasks.get(task)
    members = [(task, provider)]
  else:
    raise ValueError(_unknown_task(task, [*tasks.names(), *mixtures.names()]))
  if split not in provider.splits:
    known = ", ".join(repr(each) for each in sorted(provider.splits))
    raise ValueError(
      f"seqio task {task!r} has no split {split!r}; it has {known or 'none'}"
    )
  return [(name, each) for name, each in members if split in each.splits]


def _unknown_task(task: str, names: list[str]) -> str:
  """Words the error about an unregistered task."""
  near = difflib.get_close_matches(task, names, n=5, cutoff=0.4)
  listed = ", ".join(repr(each) for each in near or sorted(names)[:10])
  hint = f"{'near matches' if near else 'registered are'}: {listed}"
  return (
    f"no seqio task or mixture is registered as {task!r}; import the module "
    f"that registers it first ({hint if names else 'none is registered'})"
  )


def _dataset(name: str, task: Any, split: str) -> Any:
  """Opens one task's tf.data dataset and checks its features."""
  tensorflow = import_tensorflow()
  dataset = task.get_dataset(
    sequence_length=None, split=split, shuffle=False, use_cached=False
  )
  spec = dataset.element_spec
  for feature in ("text", *_OPTIONAL):
    if feature not in spec:
      continue
    shape, dtype = spec[feature].shape, spec[feature].dtype
    if dtype != tensorflow.string or shape.rank != 0:
      raise ValueError(
        f"feature {feature!r} of seqio task {name!r} must be one string, but "
        f"is {dtype.name} of shape {shape}; register the raw text as a task"
      )
  if "text" not in spec:
    raise ValueError(
      f"seqio task {name!r} has no feature 'text' (it has "
      f"{', '.join(map(repr, sorted(spec)))}); add a preprocessor that puts "
      "the raw text there"
    )
  return dataset


def _documents(
  task: str,
  split: str,
  datasets: list[tuple[str, Any]],
  encoding_errors: str,
) -> Iterator[Document]:
  """Yields the documents of each (name, dataset) in turn."""
  empty = True
  for name, dataset in datasets:
    for position, example in enumerate(_examples(name, split, dataset)):
      told = {
        # Bytes that are no text still tell units apart.
        feature: example[feature].decode("utf-8", errors="surrogateescape")
        for feature in _OPTIONAL
        if feature in example
      }
      source = told.get("source") or f"{name}:{split}:{position}"
      try:
        text = example["text"].decode("utf-8", errors=encoding_errors)
      except UnicodeDecodeError as error:
        raise ValueError(
          f"document {source!r} of seqio task {name!r} is not UTF-8 at byte "
          f"{error.start}; mend it, or replace what is wrong in such texts "
          "(dptrain prepare --encoding_errors=replace)"
        ) from error
      empty = False
      yield Document(
        source, text, told.get("document", ""), told.get("unit", "")
      )
  if empty:
    raise ValueError(
      f"split {split!r} of seqio task {task!r} holds no document; check the "
      "task's files and how it divides them into splits"
    )


def _examples(name: str, split: str, dataset: Any) -> Iterator[dict[str, Any]]:
  """Yields a dataset's examples; one plain sentence if reading fails."""
  number = 0
  examples = dataset.as_numpy_iterator()
  while True:
    try:
      example = next(examples, None)
    except import_tensorflow().errors.OpError as error:
      raised = _RAISED.search(error.message)
      told = raised[1] if raised else _NODES.sub("", error.message).strip()
      raise ValueError(
        f"split {split!r} of seqio task {name!r} cannot be read beyond "
        f"{number} document(s): {told}"
      ) from error
    if example is None:
      return
    number += 1
    yield example
