"""The user's own text files, found by globs, as a seqio task.

Files are cut into passages at line ends, which know their document (a file, or
a part of one) and perhaps their user. No Python is needed: a gin file binds
`register`'s arguments.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
import dataclasses
import glob
import hashlib
import os
import re
from typing import Final

from dptrain.tasks import raw_text

_WILDCARD: Final = re.compile(r"[*?\[]")
_ERROR_HANDLERS: Final = ("strict", "replace", "ignore")
_BYTE_ORDER_MARK: Final = "\ufeff"
_READ_BYTES: Final = 2**16
# By what is in one split: what to do where that is too few.
_SHORT_OF: Final = {
  "record": "lower passage_chars",
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

  Returns:
    The task's name, a function of the arguments.

  Raises:
    ValueError: if an argument is out of range, if a file is not UTF-8, or if
      the files hold no text or too few passages to fill both splits.
    FileNotFoundError: if a glob matches no file.
  """
  corpus = _TextFiles(
    globs=_absolute_globs(files),
    validation_fraction=validation_fraction,
    passage_chars=passage_chars,
    encoding_errors=encoding_errors,
    document=document,
    unit=unit,
    split_by=split_by,
  )
  found = tuple(_find_files(corpus.globs))
  lowest = _survey(corpus, found)
  splits = (raw_text.TRAIN, raw_text.VALIDATION)
  return raw_text.add_task(
    f"dptrain_text_files_{corpus.digest()}",
    lambda split: _Passages(corpus, found, lowest, split),
    splits if validation_fraction else splits[:1],
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
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(
        f"validation_fraction={self.validation_fraction} must be at least 0 "
        "and below 1"
      )
    if self.passage_chars < 1:
      raise ValueError(
        f"passage_chars={self.passage_chars} must be at least 1; the default "
        "is 20000"
      )
    if self.encoding_errors not in _ERROR_HANDLERS:
      raise ValueError(
        f"encoding_errors={self.encoding_errors!r} must be one of "
        f"{', '.join(map(repr, _ERROR_HANDLERS))}"
      )
    if self.split_by not in _SHORT_OF:
      raise ValueError(
        f"split_by={self.split_by!r} must be 'record', 'document' or 'user'"
      )
    if self.split_by == "user" and self.unit is None:
      raise ValueError(
        "split_by='user' needs unit, a regular expression that finds the user "
        "in a file's path (--gin.USER_IN_PATH)"
      )
    for name in ("document", "unit"):
      try:
        re.compile(getattr(self, name) or "")
      except re.error as error:
        raise ValueError(
          f"{name}={getattr(self, name)!r} is no regular expression: {error}"
        ) from error
    groups = re.compile(self.unit or "()").groups
    if groups != 1:
      raise ValueError(
        f"unit={self.unit!r} has {groups} groups; it needs one, around what "
        "names the user, as in '-([A-Za-z]+)[.]txt'"
      )

  def unit_of(self, key: str) -> str:
    """The user that a file is of; empty if none is asked for."""
    if self.unit is None:
      return ""
    match = re.search(self.unit, key)
    if match is None or not match[1]:
      raise ValueError(
        f"unit={self.unit!r} finds no user in the path {key!r}; correct the "
        "expression, or give globs of files that have one"
      )
    return match[1]

  def digest(self) -> str:
    """Names the arguments in ten hexadecimal digits."""
    return hashlib.sha256(repr(self).encode()).hexdigest()[:10]


@dataclasses.dataclass(frozen=True)
class _Passages:
  """One split's passages with their keys; reads the files at each iteration."""

  corpus: _TextFiles
  found: tuple[tuple[str, str], ...]
  lowest: float
  split: str

  def __iter__(self) -> Iterator[tuple[str, str, str, str]]:
    wanted = self.split == raw_text.VALIDATION
    for fraction, passage in _passages(self.corpus, self.found):
      if _is_validation(self.corpus, fraction, self.lowest) == wanted:
        yield passage


def _is_validation(corpus: _TextFiles, fraction: float, lowest: float) -> bool:
  """Tells whether a passage with this hash belongs to validation."""
  # The lowest hash always does, so that a small corpus has a validation split.
  return corpus.validation_fraction > 0 and (
    fraction <= max(lowest, corpus.validation_fraction)
  )


def _survey(corpus: _TextFiles, found: tuple[tuple[str, str], ...]) -> float:
  """Reads everything once for its errors; returns the lowest passage hash."""
  fractions = [fraction for fraction, _ in _passages(corpus, found)]
  if not fractions:
    raise ValueError(
      f"the {len(found)} files that match {', '.join(corpus.globs)} hold no "
      "text; give files with text in them"
    )
  lowest = min(fractions)
  if all(_is_validation(corpus, each, lowest) for each in fractions):
    raise ValueError(
      f"{len(fractions)} passage(s) in {', '.join(corpus.globs)} leave the "
      f"train split empty at validation_fraction={corpus.validation_fraction}, "
      f"passage_chars={corpus.passage_chars}, split_by={corpus.split_by!r}; "
      f"{_SHORT_OF[corpus.split_by]}, or set validation_fraction=0 to train "
      "without validation"
    )
  return lowest


def _absolute_globs(files: str | Sequence[str]) -> tuple[str, ...]:
  """Expands "~" and makes globs absolute."""
  globs = (files,) if isinstance(files, str) else tuple(files)
  if not globs or not all(globs):
    raise ValueError(
      f"files={files!r} names no file; give a glob such as 'corpus/**/*.txt'"
    )
  return tuple(os.path.abspath(os.path.expanduser(each)) for each in globs)


def _find_files(globs: tuple[str, ...]) -> Iterator[tuple[str, str]]:
  """Yields (path, path below the glob's fixed part), each file once, sorted."""
  keys: dict[str, str] = {}
  for pattern in globs:
    # A file's name may itself contain a bracket.
    literal = os.path.isfile(pattern)
    matches = [pattern] if literal else glob.glob(pattern, recursive=True)
    paths = [path for path in matches if os.path.isfile(path)]
    if not paths:
      hint = " (a folder: append '/**/*.txt')" if os.path.isdir(pattern) else ""
      raise FileNotFoundError(f"no file matches {pattern!r}{hint}")
    wildcard = None if literal else _WILDCARD.search(pattern)
    fixed = pattern[: wildcard.start()] if wildcard else pattern
    root = os.path.dirname(fixed)
    for path in paths:
      # Two globs, or a link, may lead to one file; it must count once.
      key = os.path.relpath(path, root).replace(os.sep, "/")
      keys.setdefault(os.path.realpath(path), key)
  yield from sorted(keys.items())


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
        raise ValueError(
          f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at "
          f"offset {offset - waiting + error.start}; convert the file, or set "
          "encoding_errors='replace' (--gin.ENCODING_ERRORS=replace)"
        ) from error
      if strict and "\0" in text:
        raise ValueError(
          f"{path} is binary: it holds a NUL byte near offset {offset}; leave "
          "it out, or set encoding_errors='replace' "
          "(--gin.ENCODING_ERRORS=replace) to take it as text"
        )
      held += text if offset else text.removeprefix(_BYTE_ORDER_MARK)
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
