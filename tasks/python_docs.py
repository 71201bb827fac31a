"""The embedded corpus: the English documentation that ships with Python.

Nothing is downloaded. The documents are the topics of `pydoc_data.topics` and,
for each module of the standard library, its docstrings; together about 2.2 MB,
a little more or less from one version of Python to the next.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import functools
import inspect
from pathlib import Path
import sysconfig
from typing import Final
import warnings

from dptrain.tasks import raw_text

TASK_NAME: Final = "dptrain_python_docs"
VALIDATION_FRACTION: Final = 0.05

# Tests say little in English, and other people's packages are not Python's own.
_SKIPPED_FOLDERS: Final = frozenset(
  ("test", "tests", "idle_test", "site-packages", "dist-packages")
)
_DOCUMENTED: Final = (
  ast.Module,
  ast.ClassDef,
  ast.FunctionDef,
  ast.AsyncFunctionDef,
)


def register() -> str:
  """Registers the seqio task; a second time changes nothing.

  Returns:
    The task's name, "dptrain_python_docs".
  """
  return raw_text.add_task(TASK_NAME, documents)


def documents(split: str) -> list[tuple[str, str]]:
  """Collects the documents of one split, in an order that never changes.

  About 5 % of the modules and topics, by a stable hash of their names, make up
  the validation split. No document and no text is in both.

  Args:
    split: "train" or "validation".

  Returns:
    (source, text) pairs; the source is the module's or the topic's name.

  Raises:
    FileNotFoundError: if this Python comes without the source files of its
      standard library.
  """
  wanted = split == raw_text.VALIDATION
  return [
    (name, text)
    for name, text in _all_documents()
    if (raw_text.stable_fraction(name) < VALIDATION_FRACTION) == wanted
  ]


@functools.cache
def _all_documents() -> tuple[tuple[str, str], ...]:
  """Collects every document once; parsing takes a few seconds."""
  root = Path(sysconfig.get_path("stdlib"))
  modules = list(_modules(root, ()))
  if not modules:
    raise FileNotFoundError(
      f"no standard library source files under {root}; use a Python that "
      "carries them, or train on text files of your own"
    )
  return tuple(_without_repeats([*_topics(), *modules]))


def _topics() -> Iterator[tuple[str, str]]:
  """Yields the language reference as `help()` shows it, topic by topic."""
  from pydoc_data.topics import topics

  for topic in sorted(topics):
    yield f"pydoc_data.topics:{topic}", inspect.cleandoc(topics[topic])


def _modules(
  folder: Path, package: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
  """Yields (module name, docstrings) for every module below a folder."""
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if path.is_dir():
      # Folders such as config-3.11-x86_64-linux-gnu are no packages.
      if path.name.isidentifier() and path.name not in _SKIPPED_FOLDERS:
        yield from _modules(path, (*package, path.name))
    elif path.suffix == ".py":
      parts = package if path.stem == "__init__" else (*package, path.stem)
      text = _docstrings(path)
      if text:
        yield ".".join(parts), text


def _docstrings(path: Path) -> str:
  """Joins a source file's docstrings; empty where it does not parse."""
  try:
    with warnings.catch_warnings():
      # Some modules carry invalid escapes on purpose.
      warnings.simplefilter("ignore")
      tree = ast.parse(path.read_bytes())
  except (SyntaxError, ValueError, OSError):
    return ""
  found: dict[str, None] = {}
  nodes = [each for each in ast.walk(tree) if isinstance(each, _DOCUMENTED)]
  # ast.walk goes level by level; a reader goes line by line.
  for node in sorted(nodes, key=lambda each: getattr(each, "lineno", 0)):
    docstring = ast.get_docstring(node)
    if docstring:
      found[docstring] = None
  return "\n\n".join(found)


def _without_repeats(
  pairs: list[tuple[str, str]],
) -> Iterator[tuple[str, str]]:
  """Drops documents whose text stood earlier under another name."""
  seen: set[str] = set()
  for name, text in pairs:
    if text not in seen:
      seen.add(text)
      yield name, text
