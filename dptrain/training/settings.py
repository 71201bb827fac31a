"""Type and range checks on settings, each naming the setting it refuses.

A gin binding may hold anything: a quoted "false" is true, and 64.0 is no size.
"""

from typing import Any


def check_whole(name: str, value: Any, least: int) -> None:
  """Raises ValueError unless `value` is an int of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{name}={value!r} must be a whole number >= {least}.")


def check_flag(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is True or False."""
  if not isinstance(value, bool):
    raise ValueError(f"{name}={value!r} must be True or False.")
