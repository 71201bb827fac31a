"""The user's own text files, found by globs, as a seqio task.

Files are cut into passages at line ends, which know their document (a file, or
a part of one) and perhaps their user. No Python is needed: a gin file binds
`register`'s arguments.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import re
from typing import Final

from dptrain.tasks import dividing
from dptrain.tasks import found_files
from dptrain.tasks import raw_text

_EXAMPLE: Final = "**/*.txt"
_READ_BYTES: Final = 2**16
# By what is in one split: what to do where that is too few.
_SHORT_OF: Final = {
  "record": "lower passage_chars={}",
  "document": "tell where documents begin in a file (document, or"
  " --gin.DOCUMENT_START), or give more files",
  "user": "give text of more users",
}


def register(
  files: str | Sequence[str],
  *,
  validation_fraction: float = 0.05,
  passage_chars: int = 20_000,
  encoding_errors: str = "strict",
  document: str | None = None,
  unit: str | None = None,
  split_by: str = "record",
  read_through: bool = True,
) -> str:
  """Registers text files as a seqio task, after reading them through once.

  The validation split takes each passage whose stable hash of (path below the
  glob's fixed part, passage number) is under `validation_fraction`, and at
  least one passage; a single big file is thus divided as well. With `split_by`
  it is whole documents, or users, that are divided. Registering the
  same arguments again looks at the files anew and replaces the task.

  Args:
    files: one glob or several; "**" stands for any depth of folders and "~" for
      the home folder. Plain paths are globs too.
    validation_fraction: share of the passages in the validation split, in
      [0, 1). At 0 the task has no validation split.
    passage_chars: the longest passage in characters. A passage ends at a line's
      end, unless the line itself is longer: then it is cut there.
    encoding_errors: "strict" refuses bytes that are not UTF-8; "replace" reads
      them as U+FFFD; "ignore" skips them.
    document: a regular expression that matches a line, from its beginning,
      where a new document begins: "" for each line, "[ ]*$" for blank lines,
      " = [^=]" for WikiText's titles. None: a file is a document.
    unit: a regular expression with one group, which finds the user in a file's
      path (below the glob's fixed part); None if users are not known. For
      PrivacySettings.unit="user".
    split_by: "record" (here: a passage), "document" or "user": what is in one
      split with all its text. Choose what PrivacySettings.unit protects.
    read_through: False stops the first reading as soon as both splits have a
      passage: nothing else changes, but what is wrong further on is told when
      it is reached. For corpora of many gigabytes.

  Returns:
    The task's name, a function of the arguments.

  Raises:
    ValueError: if an argument is out of range, if a file is not UTF-8, or if
      the files hold no text or too few passages to fill both splits.
    FileNotFoundError: if a glob matches no file.
  """
  corpus = _TextFiles(
    globs=found_files.absolute_globs(files, _EXAMPLE),
    validation_fraction=validation_fraction,
    passage_chars=passage_chars,
    encoding_errors=encoding_errors,
    document=document,
    unit=unit,
    split_by=split_by,
  )
  found = tuple(found_files.find(corpus.globs, _EXAMPLE))
  division = dividing.survey(
    (fraction for fraction, _ in _passages(corpus, found)),
    validation_fraction,
    where=f"the {len(found)} files that match {', '.join(corpus.globs)}",
    what=f"passage(s), divided by split_by={split_by!r},",
    way_out=_SHORT_OF[split_by].format(passage_chars),
    read_through=read_through,
  )
  return raw_text.add_task(
    f"dptrain_text_files_{corpus.digest()}",
    lambda split: _Passages(corpus, found, division, split),
    division.splits,
  )


@dataclasses.dataclass(frozen=True)
class _TextFiles:
  """`register`'s arguments, the globs made absolute."""

  globs: tuple[str, ...]
  validation_fraction: float
  passage_chars: int
  encoding_errors: str
  document: str | None = None
  unit: str | None = None
  split_by: str = "record"

  def __post_init__(self) -> None:
    dividing.check_fraction(self.validation_fraction)
    if self.passage_chars < 1:
      raise ValueError(
        f"passage_chars={self.passage_chars} must be at least 1; the default "
        "is 20000"
      )
    found_files.check_encoding_errors(self.encoding_errors)
    dividing.check_split_by(
      self.split_by,
      self.unit,
      "unit, a regular expression that finds the user in a file's path"
      " (--gin.USER_IN_PATH)",
    )
    dividing.check_pattern("unit", self.unit)
    dividing.check_pattern("document", self.document, groups=None)

  def unit_of(self, key: str) -> str:
    """The user that a file is of; empty if none is asked for."""
    if self.unit is None:
      return ""
    return dividing.found_user(
      "unit",
      self.unit,
      key,
      f"the path {key!r} (what stands before a glob's first wildcard is no part"
      " of it)",
    )

  def digest(self) -> str:
    """Names the arguments in ten hexadecimal digits."""
    return hashlib.sha256(repr(self).encode()).hexdigest()[:10]


@dataclasses.dataclass(frozen=True)
class _Passages:
  """One split's passages with their keys; reads the files at each iteration."""

  corpus: _TextFiles
  found: tuple[tuple[str, str], ...]
  division: dividing.Division
  split: str

  def __iter__(self) -> Iterator[tuple[str, str, str, str]]:
    wanted = self.split == raw_text.VALIDATION
    for fraction, passage in _passages(self.corpus, self.found):
      if self.division.is_validation(fraction) == wanted:
        yield passage


def _passages(
  corpus: _TextFiles, found: tuple[tuple[str, str], ...]
) -> Iterator[tuple[float, tuple[str, str, str, str]]]:
  """Yields (hash in [0, 1), (source, passage, document, user))."""
  for path, key in found:
    user = corpus.unit_of(key)
    for number, (begun, text) in enumerate(_cut(_lines(corpus, path), corpus)):
      if text.strip():
        source = f"{key}:{number}"
        document = key if corpus.document is None else f"{key}#{begun}"
        whole = {"record": source, "document": document, "user": user}
        fraction = raw_text.stable_fraction(whole[corpus.split_by])
        yield fraction, (source, text, document, user)


def _cut(lines: Iterator[str], corpus: _TextFiles) -> Iterator[tuple[int, str]]:
  """Gathers lines into passages of at most `passage_chars` characters.

  Yields:
    How many documents have begun within the file, and a passage.
  """
  limit, begins = corpus.passage_chars, re.compile(corpus.document or "")
  held: list[str] = []
  length, begun, whole = 0, 0, True
  for line in lines:
    # What is left of a long line begins none.
    first = corpus.document is not None and whole and bool(begins.match(line))
    if held and (first or length + len(line) > limit):
      yield begun, "".join(held)
      held, length = [], 0
    begun += first
    held.append(line)
    length += len(line)
    whole = line.endswith("\n")
  if held:
    yield begun, "".join(held)


def _lines(corpus: _TextFiles, path: str) -> Iterator[str]:
  """Decodes a file line by line; a long line in parts of `passage_chars`."""
  limit, strict = corpus.passage_chars, corpus.encoding_errors == "strict"
  decoder = codecs.getincrementaldecoder("utf-8")(corpus.encoding_errors)
  offset, held = 0, ""
  with open(path, "rb") as file:
    while True:
      raw = file.readline(max(limit, _READ_BYTES))
      waiting = len(decoder.getstate()[0])
      try:
        text = decoder.decode(raw, final=not raw)
      except UnicodeDecodeError as error:
        raise found_files.not_utf8(path, error, offset - waiting) from error
      if strict and "\0" in text:
        raise ValueError(
          f"{path} is binary: it holds a NUL byte near offset {offset}; leave "
          "it out, or set encoding_errors='replace' "
          "(--gin.ENCODING_ERRORS=replace) to take it as text"
        )
      held += text if offset else text.removeprefix(found_files.BYTE_ORDER_MARK)
      offset += len(raw)
      # A text that just fills a part may be followed by more of its line.
      while len(held) > limit:
        yield held[:limit]
        held = held[limit:]
      if held and (not raw or raw.endswith(b"\n")):
        yield held
        held = ""
      if not raw:
        return
