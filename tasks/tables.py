"""Rows of named fields in files: what JSON lines and Parquet share.

A row is a text, perhaps with the key of its document and that of its user. A
row without a document's key is a document of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
from typing import Any, Final, NamedTuple

from dptrain.tasks import dividing
from dptrain.tasks import found_files
from dptrain.tasks import raw_text

_NAMES_TOLD: Final = 12
_KINDS: Final = {
  dict: "an object",
  list: "an array",
  bool: "true or false",
  int: "a whole number",
  float: "a number with a fraction",
  type(None): "null",
}


class Words(NamedTuple):
  """How a format speaks of its parts.

  Attributes:
    row: "line" or "row".
    field: "field" or "column"; also the end of its settings' names.
    example: a glob of such files, below a folder.
  """

  row: str
  field: str
  example: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """What a row's fields mean, and how rows are divided.

  Attributes:
    words: of the format.
    globs: absolute.
    text: name of the field with the text.
    unit: name of the field with the user's key; None if users are not known.
    document: name of the field with the document's key; None: each row is one.
    unit_pattern: a regular expression with one group that finds the user in the
      field `unit`; None: the whole field names the user.
    validation_fraction: share of the documents (or users) in the validation
      split.
    split_by: "record" (a row), "document" or "user": what is in one split with
      all its text.
    encoding_errors: "strict", "replace" or "ignore".
    max_bytes: the longest line, or text, that is read.

  Raises:
    ValueError: if a setting is out of range.
  """

  words: Words
  globs: tuple[str, ...]
  text: str
  unit: str | None
  document: str | None
  unit_pattern: str | None
  validation_fraction: float
  split_by: str
  encoding_errors: str
  max_bytes: int

  def __post_init__(self) -> None:
    for name in ("text", "unit", "document"):
      value = getattr(self, name)
      if not (isinstance(value, str) and value) and (
        name == "text" or value is not None
      ):
        raise ValueError(
          f"{name}_{self.words.field}={value!r} must be the name of a "
          f"{self.words.field}"
        )
    dividing.check_fraction(self.validation_fraction)
    named = f"unit_{self.words.field}"
    way_out = f"{named}, the {self.words.field} that names the user"
    dividing.check_split_by(self.split_by, self.unit, way_out)
    dividing.check_pattern("unit_pattern", self.unit_pattern)
    if self.unit_pattern is not None and self.unit is None:
      raise ValueError(f"unit_pattern={self.unit_pattern!r} needs {way_out}")
    found_files.check_encoding_errors(self.encoding_errors)
    if self.max_bytes < 1:
      raise ValueError(
        f"max_bytes={self.max_bytes} must be at least 1; the default is "
        "16000000"
      )

  @property
  def named(self) -> dict[str, str]:
    """The fields that are read: what for, and their names."""
    kinds = {"text": self.text, "unit": self.unit, "document": self.document}
    return {kind: name for kind, name in kinds.items() if name is not None}

  def digest(self) -> str:
    """Names the settings in ten hexadecimal digits."""
    told = dataclasses.asdict(self)
    # How errors are worded decides nothing.
    del told["words"]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:10]


class Row(NamedTuple):
  """One row.

  Attributes:
    number: from 1, blank lines included.
    values: what its fields hold.
  """

  number: int
  values: dict[str, Any]


Reader = Callable[[Table, str], Iterator[Row]]


def add_task(
  kind: str, table: Table, read: Reader, *, read_through: bool
) -> str:
  """Registers the rows of files as a seqio task, after reading them once.

  Args:
    kind: names the format in the task's name.
    table: the settings.
    read: yields a file's rows, at least one; raises ValueError for what it
      cannot read. Called with settings and path.
    read_through: as in `dividing.survey`.

  Returns:
    The task's name, a function of kind and settings.

  Raises:
    ValueError: if a row cannot be read, or the files hold no text, or too
      little for both splits.
    FileNotFoundError: if a glob matches no file.
  """
  found = tuple(found_files.find(table.globs, table.words.example))
  corpus = _Rows(table, read, found)
  what = f"{table.split_by}(s)"
  division = dividing.survey(
    (fraction for fraction, _ in corpus.texts()),
    table.validation_fraction,
    where=f"the {len(found)} files that match {', '.join(table.globs)}",
    what=f"{table.words.row}(s), divided by {what},",
    way_out="bring more text",
    read_through=read_through,
  )
  return raw_text.add_task(
    f"dptrain_{kind}_{table.digest()}",
    lambda split: _Split(corpus, division, split),
    division.splits,
  )


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The rows of all files; reads them at each iteration."""

  table: Table
  read: Reader
  found: tuple[tuple[str, str], ...]

  def texts(self) -> Iterator[tuple[float, tuple[str, str, str, str]]]:
    """Yields (hash in [0, 1), quadruple for `raw_text`) of rows with text."""
    table = self.table
    for path, key in self.found:
      for number, values in self.read(table, path):
        where = place(table, path, number)
        source = f"{key}:{number}"
        text = _text(table, values, where)
        document, unit = source, ""
        if table.document is not None:
          document = _key(table, "document", values, where)
        if table.unit is not None:
          unit = _user(table, values, where)
        if text.strip():
          whole = {"record": source, "document": document, "user": unit}
          fraction = raw_text.stable_fraction(whole[table.split_by])
          yield fraction, (source, text, document, unit)


@dataclasses.dataclass(frozen=True)
class _Split:
  """One split's texts; reads the files at each iteration."""

  corpus: _Rows
  division: dividing.Division
  split: str

  def __iter__(self) -> Iterator[tuple[str, str, str, str]]:
    wanted = self.split == raw_text.VALIDATION
    for fraction, told in self.corpus.texts():
      if self.division.is_validation(fraction) == wanted:
        yield told


def place(table: Table, path: str, number: int) -> str:
  """Says where a row is, for messages."""
  return f"{path}, {table.words.row} {number},"


def listed(names: list[str]) -> str:
  """Names in quotes; the first dozen, if there are more."""
  told = ", ".join(map(repr, names[:_NAMES_TOLD]))
  left = len(names) - _NAMES_TOLD
  return f"{told} and {left} more" if left > 0 else told or "none"


def way_out(table: Table, kind: str) -> str:
  """How to name another field, for messages."""
  field = table.words.field
  return (
    f"name the right {field} by {kind}_{field} "
    f"(--gin.{kind.upper()}_{field.upper()}=...)"
  )


def _text(table: Table, values: dict[str, Any], where: str) -> str:
  text = _value(table, "text", values, where)
  if isinstance(text, str):
    return text
  raise _wrong(table, "text", text, where, "a string")


def _user(table: Table, values: dict[str, Any], where: str) -> str:
  key = _key(table, "unit", values, where)
  if table.unit_pattern is None:
    return key
  told = f"{table.words.field} {table.unit!r} of {where.rstrip(',')}"
  return dividing.found_user("unit_pattern", table.unit_pattern, key, told)


def _key(table: Table, kind: str, values: dict[str, Any], where: str) -> str:
  key = _value(table, kind, values, where)
  # Accounts often are numbers; True is no number here.
  if isinstance(key, int) and not isinstance(key, bool):
    return str(key)
  if not isinstance(key, str):
    raise _wrong(table, kind, key, where, "a string or a whole number")
  if not key:
    raise ValueError(
      f"{where} has an empty {table.words.field} {table.named[kind]!r}, which"
      f" names no {'user' if kind == 'unit' else 'document'}: leave the"
      f" {table.words.row} out, or give it a key"
    )
  return key


def _value(table: Table, kind: str, values: dict[str, Any], where: str) -> Any:
  name = table.named[kind]
  if name not in values:
    raise ValueError(
      f"{where} has no {table.words.field} {name!r} (it has "
      f"{listed(sorted(values))}): mend the {table.words.row}, or "
      f"{way_out(table, kind)}"
    )
  return values[name]


def _wrong(
  table: Table, kind: str, value: Any, where: str, wanted: str
) -> ValueError:
  found = _KINDS.get(type(value), f"a {type(value).__name__}")
  return ValueError(
    f"{where} has {found} in {table.words.field} {table.named[kind]!r}, which"
    f" must be {wanted}: mend the {table.words.row}, or {way_out(table, kind)}"
  )
