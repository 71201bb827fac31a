"""Files that globs find, and what is done about bytes that are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import glob
import os
import re
from typing import Final

BYTE_ORDER_MARK: Final = "\ufeff"
_ERROR_HANDLERS: Final = ("strict", "replace", "ignore")
_WILDCARD: Final = re.compile(r"[*?\[]")


def absolute_globs(files: str | Sequence[str], example: str) -> tuple[str, ...]:
  """Expands "~" and makes globs absolute.

  Args:
    files: one glob or several.
    example: such a glob, for messages: "**/*.txt".

  Raises:
    ValueError: if there is none, or an empty one.
  """
  globs = (files,) if isinstance(files, str) else tuple(files)
  if not globs or not all(globs):
    raise ValueError(
      f"files={files!r} names no file; give a glob such as 'corpus/{example}'"
    )
  return tuple(os.path.abspath(os.path.expanduser(each)) for each in globs)


def find(globs: Sequence[str], example: str) -> Iterator[tuple[str, str]]:
  """Yields (path, path below the glob's fixed part), each file once, sorted.

  Args:
    globs: what `absolute_globs` returns.
    example: such a glob, for messages: "**/*.txt".

  Raises:
    FileNotFoundError: if a glob matches no file.
  """
  keys: dict[str, str] = {}
  for pattern in globs:
    # A file's name may itself contain a bracket.
    literal = os.path.isfile(pattern)
    matches = [pattern] if literal else glob.glob(pattern, recursive=True)
    paths = [path for path in matches if os.path.isfile(path)]
    if not paths:
      folder = os.path.isdir(pattern)
      hint = f" (a folder: append '/{example}')" if folder else ""
      raise FileNotFoundError(
        f"no file matches {pattern!r}{hint or '; correct the glob'}"
      )
    wildcard = None if literal else _WILDCARD.search(pattern)
    fixed = pattern[: wildcard.start()] if wildcard else pattern
    root = os.path.dirname(fixed)
    for path in paths:
      # Two globs, or a link, may lead to one file; it must count once.
      key = os.path.relpath(path, root).replace(os.sep, "/")
      keys.setdefault(os.path.realpath(path), key)
  yield from sorted(keys.items())


def check_encoding_errors(encoding_errors: str) -> None:
  """Refuses what is none of "strict", "replace" and "ignore"."""
  if encoding_errors not in _ERROR_HANDLERS:
    raise ValueError(
      f"encoding_errors={encoding_errors!r} must be one of "
      f"{', '.join(map(repr, _ERROR_HANDLERS))}"
    )


def not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> ValueError:
  """The error about bytes that are not UTF-8, with the way out.

  Args:
    where: the file, or a place in it.
    error: what was raised.
    offset: of the first byte that was decoded, counted from the start of what
      `where` names.
  """
  return ValueError(
    f"{where} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
    f"{offset + error.start}; convert the file, or set "
    "encoding_errors='replace' (--gin.ENCODING_ERRORS=replace)"
  )
