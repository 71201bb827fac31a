"""Type and range checks on settings, each naming the setting it refuses.

A gin binding may hold anything: a quoted "false" is true, and 64.0 is no size.
"""

import math
import numbers
from typing import Any


def check_whole(name: str, value: Any, least: int) -> None:
  """Raises ValueError unless `value` is an int of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{name}={value!r} must be a whole number >= {least}.")


def check_flag(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is True or False."""
  if not isinstance(value, bool):
    raise ValueError(f"{name}={value!r} must be True or False.")


def check_not_negative(name: str, value: Any, way_out: str) -> None:
  """Raises ValueError unless `value` is a finite number of at least 0.

  Args:
    name: of the setting.
    value: of it.
    way_out: ends the sentence.
  """
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not number or not 0.0 <= value < math.inf:
    raise ValueError(
      f"{name}={value!r} must be a number, finite and not negative; {way_out}."
    )
