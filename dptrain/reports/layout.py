"""Text for people: figures that claim no more than is true, and lines.

Reports, plans, advice and verdicts of audits are laid out with these.
"""

from collections.abc import Sequence
import decimal
import shlex
import textwrap


def rounded_up(bound: float) -> str:
  """Four digits, never below `bound`: less would claim too much."""
  context = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)
  return f"{float(context.create_decimal_from_float(bound)):.4g}"


def paragraph(text: str) -> list[str]:
  """Lines of at most 80 columns."""
  return textwrap.wrap(text, 80)


def bullets(texts: list[str]) -> list[str]:
  """Each text with a dash in front, wrapped."""
  return [
    line
    for text in texts
    for line in textwrap.wrap(
      text, 78, initial_indent="  - ", subsequent_indent="    "
    )
  ]


def table(rows: list[tuple[str, str]]) -> list[str]:
  """Names and values in two columns, wrapped."""
  width = max(len(name) for name, _ in rows) + 2
  return [
    line
    for name, value in rows
    for line in textwrap.wrap(
      value,
      80,
      initial_indent=f"{name:{width}}",
      subsequent_indent=" " * width,
    )
  ]


def typed(command: Sequence[str]) -> list[str]:
  """A command in lines of at most 80 columns that a shell takes as one."""
  lines = [""]
  for word in command:
    word = shlex.quote(word)
    if lines[-1] and len(lines[-1]) + len(word) > 77:
      lines.append("   ")
    lines[-1] += f" {word}" if lines[-1] else word
  return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
