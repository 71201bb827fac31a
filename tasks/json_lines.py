"""The user's own JSON lines, found by globs, as a seqio task.

One object per line, in files that may be compressed by gzip. No Python is
needed: gin/json_lines.gin binds `register`'s arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import gzip
import json
from typing import Any, BinaryIO, Final
import zlib

from dptrain.tasks import found_files
from dptrain.tasks import tables

_WORDS: Final = tables.Words("line", "field", "**/*.jsonl*")
_GZIP: Final = b"\x1f\x8b"
_MARK: Final = found_files.BYTE_ORDER_MARK.encode()


def register(
  files: str | Sequence[str],
  *,
  text_field: str = "text",
  unit_field: str | None = None,
  document_field: str | None = None,
  unit_pattern: str | None = None,
  validation_fraction: float = 0.05,
  split_by: str = "record",
  encoding_errors: str = "strict",
  max_bytes: int = 16_000_000,
  read_through: bool = True,
) -> str:
  """Registers JSON lines as a seqio task, after reading them through once.

  Each line is a text, and a document of its own unless `document_field` tells
  which document it belongs to, in whatever file. Lines that are blank, or whose
  text is, are left out. Files that begin as gzip does are decompressed while
  they are read. The validation split takes each document (or user, by
  `split_by`) whose stable hash is under `validation_fraction`, and at least
  one. Registering the same arguments again looks at the files anew and replaces
  the task.

  Args:
    files: one glob or several; "**" stands for any depth of folders and "~" for
      the home folder.
    text_field: the field with the text, a string.
    unit_field: the field that names the user, a string or a whole number; None
      if users are not known. For PrivacySettings.unit="user".
    document_field: likewise for the document.
    unit_pattern: a regular expression with one group that finds the user in
      `unit_field`, such as the site in an address; None: all of it.
    validation_fraction: share of documents (or users) in the validation split,
      in [0, 1). At 0 the task has no validation split.
    split_by: "record", "document" or "user": what is in one split with all its
      text.
      Choose what PrivacySettings.unit protects.
    encoding_errors: "strict" refuses bytes that are not UTF-8; "replace" reads
      them as U+FFFD; "ignore" skips them.
    max_bytes: the longest line that is read; a longer one is refused before it
      fills the memory.
    read_through: False stops the first reading as soon as both splits have a
      document: nothing else changes, but what is wrong further on is told when
      it is reached. For corpora of many gigabytes.

  Returns:
    The task's name, a function of the arguments.

  Raises:
    ValueError: if an argument is out of range; if a line is no JSON object, not
      UTF-8, too long, or lacks a field; if a file is empty; if the files hold
      no text or too little for both splits.
    FileNotFoundError: if a glob matches no file.
  """
  table = tables.Table(
    words=_WORDS,
    globs=found_files.absolute_globs(files, _WORDS.example),
    text=text_field,
    unit=unit_field,
    document=document_field,
    unit_pattern=unit_pattern,
    validation_fraction=validation_fraction,
    split_by=split_by,
    encoding_errors=encoding_errors,
    max_bytes=max_bytes,
  )
  return tables.add_task("json_lines", table, _rows, read_through=read_through)


def _rows(table: tables.Table, path: str) -> Iterator[tables.Row]:
  """Yields the objects of a file; memory for one line."""
  number, blank = 0, True
  with _opened(path) as file:
    while line := _line(table, path, file, number + 1):
      number += 1
      if number == 1:
        line = line.removeprefix(_MARK)
      if not line.strip():
        continue
      blank = False
      where = tables.place(table, path, number)
      yield tables.Row(number, _object(table, line, where))
  if blank:
    raise ValueError(
      f"{path} is empty: no line holds anything; write it again, or leave it"
      " out of the glob"
    )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
  """Opens a file, through gzip if it begins as gzip's do."""
  with open(path, "rb") as file:
    zipped = file.peek(len(_GZIP)).startswith(_GZIP)
    if not zipped:
      yield file
      return
    with gzip.GzipFile(fileobj=file) as inner:
      yield inner  # type: ignore[misc]


def _line(table: tables.Table, path: str, file: BinaryIO, number: int) -> bytes:
  """Reads a line of at most `max_bytes`; nothing at the end."""
  try:
    line = file.readline(table.max_bytes + 1)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{path} is damaged or cut short: it begins as gzip does, but cannot be"
      f" decompressed beyond line {number - 1} ({error}); write it again"
    ) from error
  if len(line) > table.max_bytes:
    raise ValueError(
      f"{tables.place(table, path, number)} is longer than"
      f" max_bytes={table.max_bytes}; cut its text into several lines (with one"
      " document_field for all), or raise json_lines.register.max_bytes"
    )
  return line


def _object(table: tables.Table, line: bytes, where: str) -> dict[str, Any]:
  """Parses one line."""
  if b"\0" in line and table.encoding_errors == "strict":
    raise ValueError(
      f"{where} holds a NUL byte: the file is binary or not UTF-8; leave it"
      " out, or convert it"
    )
  try:
    text = line.decode(errors=table.encoding_errors).rstrip()
  except UnicodeDecodeError as error:
    raise found_files.not_utf8(where.rstrip(","), error, 0) from error
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{where} is not JSON ({error.msg} at column {error.colno}); a file needs"
      " one object on each line: `jq -c` writes an object as one line, `jq -c"
      " '.[]'` the objects of an array"
    ) from error
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{where} holds JSON that cannot be read ({error}); mend the line"
    ) from error
  if isinstance(value, dict):
    return value
  found = "an array" if isinstance(value, list) else "a single value"
  raise ValueError(
    f"{where} is {found} and no JSON object; a file needs one object on each"
    f" line, such as {{{json.dumps(table.text)}: ...}} (`jq -c '.[]'` writes"
    " the objects of an array so)"
  )
