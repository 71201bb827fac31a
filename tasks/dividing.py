"""Which split a text belongs to, and which user is found in its key.

The split follows from a stable hash of what must not be divided: a passage, a
document, a user. No other text has a say, but for the smallest corpora.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import math
import re

from dptrain.tasks import raw_text


@dataclasses.dataclass(frozen=True)
class Division:
  """How texts are divided between training and validation.

  Attributes:
    validation_fraction: share of the hashes in the validation split.
    lowest: the lowest hash of the corpus, which always is in it, so that a
      small corpus has a validation split.
  """

  validation_fraction: float
  lowest: float = 0.0

  def is_validation(self, fraction: float) -> bool:
    """Tells whether what has this hash, in [0, 1), belongs to validation."""
    return self.validation_fraction > 0 and (
      fraction <= max(self.lowest, self.validation_fraction)
    )

  @property
  def splits(self) -> tuple[str, ...]:
    """The names of the splits that there are."""
    both = (raw_text.TRAIN, raw_text.VALIDATION)
    return both if self.validation_fraction else both[:1]


def survey(
  fractions: Iterable[float],
  validation_fraction: float,
  *,
  where: str,
  what: str,
  way_out: str,
  read_through: bool,
) -> Division:
  """Reads a corpus for its errors and for its lowest hash.

  Args:
    fractions: the hash of every text; raises the corpus's errors.
    validation_fraction: share of the hashes in the validation split.
    where: the files, for messages.
    what: what the hashes are of, for messages: "passage(s)".
    way_out: what else to do if nothing is left to train on, for messages.
    read_through: False: stop as soon as both splits hold something. The
      division is the same; errors further on are told when they are reached.

  Returns:
    The division.

  Raises:
    ValueError: if there is no text, or none is left to train on.
  """
  count, lowest, highest = 0, math.inf, -math.inf
  for fraction in fractions:
    count += 1
    lowest, highest = min(lowest, fraction), max(highest, fraction)
    both = lowest <= validation_fraction < highest
    if not read_through and (both or not validation_fraction):
      break
  if not count:
    raise ValueError(f"{where} hold no text; give files with text in them")
  division = Division(validation_fraction, lowest)
  if division.is_validation(highest):
    raise ValueError(
      f"{count} {what} in {where} leave the train split empty at "
      f"validation_fraction={validation_fraction}; {way_out}, or set "
      "validation_fraction=0 to train without validation"
    )
  return division


def check_fraction(validation_fraction: float) -> None:
  """Refuses a share of the corpus that is not in [0, 1)."""
  if not 0 <= validation_fraction < 1:
    raise ValueError(
      f"validation_fraction={validation_fraction} must be at least 0 and "
      "below 1"
    )


def check_split_by(split_by: str, unit: object, way_out: str) -> None:
  """Refuses an unknown `split_by`, and "user" where no user is told.

  Args:
    split_by: what is asked for.
    unit: what tells the users, or None.
    way_out: how users are told, for messages.
  """
  if split_by not in ("record", "document", "user"):
    raise ValueError(
      f"split_by={split_by!r} must be 'record', 'document' or 'user'"
    )
  if split_by == "user" and unit is None:
    raise ValueError(f"split_by='user' needs {way_out}")


def check_pattern(
  name: str, pattern: str | None, groups: int | None = 1
) -> None:
  """Refuses what is no regular expression with one group.

  Args:
    name: the setting's, for messages.
    pattern: the expression; None is fine.
    groups: how many it must have; None: any number.
  """
  try:
    found = re.compile("()" if pattern is None else pattern).groups
  except re.error as error:
    raise ValueError(
      f"{name}={pattern!r} is no regular expression: {error}"
    ) from error
  if groups is not None and found != groups:
    raise ValueError(
      f"{name}={pattern!r} has {found} groups; it needs one, around what "
      "names the user, as in '-([A-Za-z]+)[.]txt'"
    )


def found_user(name: str, pattern: str, text: str, where: str) -> str:
  """The user that a regular expression finds.

  Args:
    name: the setting's, for messages.
    pattern: with one group.
    text: where the user is looked for.
    where: the same in words, for messages.

  Raises:
    ValueError: if none is found, or an empty one.
  """
  match = re.search(pattern, text)
  if match is None or not match[1]:
    raise ValueError(
      f"{name}={pattern!r} finds no user in {where}; correct the expression, "
      "or leave out what has none"
    )
  return match[1]
