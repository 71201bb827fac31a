"""The user's own Parquet files, found by globs, as a seqio task.

Row groups are read in parts, and of each the columns that are asked for. No
Python is needed: gin/parquet.gin binds `register`'s arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dptrain.tasks import found_files
from dptrain.tasks import tables

_WORDS: Final = tables.Words("row", "column", "**/*.parquet")
# What is decoded at once, roughly, and never more rows than that.
_PART_BYTES: Final = 2**23
_PART_ROWS: Final = 256
_BUFFER_BYTES: Final = 2**20


def register(
  files: str | Sequence[str],
  *,
  text_column: str = "text",
  unit_column: str | None = None,
  document_column: str | None = None,
  unit_pattern: str | None = None,
  validation_fraction: float = 0.05,
  split_by: str = "record",
  encoding_errors: str = "strict",
  max_bytes: int = 16_000_000,
  read_through: bool = True,
) -> str:
  """Registers Parquet files as a seqio task, after reading them through once.

  Each row is a text, and a document of its own unless `document_column` tells
  which document it belongs to, in whatever file. Rows whose text is blank are
  left out. The rest is as in `json_lines.register`.

  Args:
    files: one glob or several; "**" stands for any depth of folders and "~" for
      the home folder.
    text_column: the column with the text: strings, or bytes that are UTF-8.
    unit_column: the column that names the user, of strings or whole numbers;
      None if users are not known. For PrivacySettings.unit="user".
    document_column: likewise for the document.
    unit_pattern: a regular expression with one group that finds the user in
      `unit_column`, such as the site in an address; None: all of it.
    validation_fraction: share of documents (or users) in the validation split,
      in [0, 1). At 0 the task has no validation split.
    split_by: "record", "document" or "user": what is in one split with all its
      text.
      Choose what PrivacySettings.unit protects.
    encoding_errors: "strict" refuses bytes that are not UTF-8; "replace" reads
      them as U+FFFD; "ignore" skips them.
    max_bytes: the longest text that is taken; a longer one is refused.
    read_through: False stops the first reading as soon as both splits have a
      document: nothing else changes, but what is wrong further on is told when
      it is reached. For corpora of many gigabytes.

  Returns:
    The task's name, a function of the arguments.

  Raises:
    ValueError: if an argument is out of range; if a file is no Parquet file, is
      damaged, has no row or lacks a column; if a row has no text, or no key, or
      text that is not UTF-8 or too long; if the files hold no text or too
      little for both splits.
    FileNotFoundError: if a glob matches no file.
  """
  table = tables.Table(
    words=_WORDS,
    globs=found_files.absolute_globs(files, _WORDS.example),
    text=text_column,
    unit=unit_column,
    document=document_column,
    unit_pattern=unit_pattern,
    validation_fraction=validation_fraction,
    split_by=split_by,
    encoding_errors=encoding_errors,
    max_bytes=max_bytes,
  )
  return tables.add_task("parquet", table, _rows, read_through=read_through)


def _rows(table: tables.Table, path: str) -> Iterator[tables.Row]:
  """Yields the rows of a file; memory for a part of a row group, or a page."""
  with _opened(path) as file:
    _check_columns(table, path, file)
    names = list(dict.fromkeys(table.named.values()))
    number = 0
    for group in range(file.num_row_groups):
      for part in _parts(path, file, group, names):
        columns = [
          _values(table, path, name, part.column(name), number)
          for name in names
        ]
        for values in zip(*columns, strict=True):
          number += 1
          yield tables.Row(number, dict(zip(names, values, strict=True)))
  if not number:
    raise ValueError(
      f"{path} is empty: it has columns but no row; write it again, or leave it"
      " out of the glob"
    )


def _opened(path: str) -> pyarrow.parquet.ParquetFile:
  try:
    # Buffered, a column is read page by page, however large its row group is.
    return pyarrow.parquet.ParquetFile(
      path, buffer_size=_BUFFER_BYTES, pre_buffer=False
    )
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(
      f"{path} is no Parquet file, or is damaged ({error}); leave it out of the"
      " glob, or write it again"
    ) from error


def _check_columns(
  table: tables.Table, path: str, file: pyarrow.parquet.ParquetFile
) -> None:
  """Refuses a file without the columns, or with others of their names."""
  schema = file.schema_arrow
  for kind, name in table.named.items():
    if schema.names.count(name) != 1:
      there = "two columns" if name in schema.names else "no column"
      raise ValueError(
        f"{path} has {there} {name!r} (it has {tables.listed(schema.names)}): "
        f"{tables.way_out(table, kind)}"
      )
    found = schema.field(name).type
    if kind != "text" and pyarrow.types.is_integer(found):
      continue
    if not _is_text(found):
      wanted = "strings" if kind == "text" else "strings or whole numbers"
      texts = [each.name for each in schema if _is_text(each.type)]
      raise ValueError(
        f"column {name!r} of {path} holds {found} and no {wanted} (columns of"
        f" strings: {tables.listed(texts)}): {tables.way_out(table, kind)}"
      )


def _is_text(kind: pyarrow.DataType) -> bool:
  if pyarrow.types.is_dictionary(kind):
    return _is_text(kind.value_type)
  # "string_view" and "binary_view", too.
  return str(kind).removeprefix("large_").removesuffix("_view") in (
    "string",
    "binary",
  )


def _parts(
  path: str, file: pyarrow.parquet.ParquetFile, group: int, names: list[str]
) -> Iterator[pyarrow.RecordBatch]:
  """Yields one row group, some megabytes at a time."""
  told = file.metadata.row_group(group)
  if not told.num_rows:
    return
  columns = [told.column(place) for place in range(told.num_columns)]
  size = sum(
    each.total_uncompressed_size
    for each in columns
    if each.path_in_schema in names
  )
  each = size // told.num_rows + 1
  rows = max(1, min(_PART_ROWS, _PART_BYTES // each))
  parts = file.iter_batches(rows, [group], names, use_threads=False)
  while True:
    try:
      part = next(parts, None)
    except (pyarrow.ArrowException, OSError) as error:
      raise ValueError(
        f"row group {group} of {path} is damaged ({error}); write the file"
        " again"
      ) from error
    if part is None:
      return
    yield part


def _values(
  table: tables.Table, path: str, name: str, column: pyarrow.Array, before: int
) -> list[Any]:
  """A column's values in Python: str, int or None."""
  if pyarrow.types.is_integer(column.type):
    return list(column.to_pylist())
  if pyarrow.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  # Arrow does not look whether its strings are UTF-8.
  column = column.cast(pyarrow.large_binary())
  lengths = pyarrow.compute.binary_length(column)
  longest = pyarrow.compute.max(lengths).as_py() or 0
  if longest > table.max_bytes:
    row = pyarrow.compute.index(lengths, longest).as_py()
    raise ValueError(
      f"{tables.place(table, path, before + row + 1)} has {longest} bytes in"
      f" column {name!r}, more than max_bytes={table.max_bytes}; cut the text"
      " into several rows (with one document_column for all), or raise"
      " parquet.register.max_bytes"
    )
  values: list[Any] = column.to_pylist()
  for row, value in enumerate(values):
    if value is None:
      continue
    try:
      values[row] = value.decode(errors=table.encoding_errors)
    except UnicodeDecodeError as error:
      where = f"{tables.place(table, path, before + row + 1)} column {name!r}"
      raise found_files.not_utf8(f"{where},", error, 0) from error
  return values
