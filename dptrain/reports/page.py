"""Pieces of a self-contained page: for browser and printer, asking nobody.

A page is one HTML file with its style and plots (SVG) inside. It has no scripts
and loads nothing from anywhere.
"""

from collections.abc import Callable, Collection, Sequence
import html
import io
from typing import Any

_STYLE = """
body { font: 11pt/1.45 Georgia, serif; max-width: 46em; margin: 2em auto;
  padding: 0 1em; color: #111; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 1.6em; }
.claim { border-left: 4px solid #235; padding: .4em 1em; background: #f3f5f8; }
table { border-collapse: collapse; width: 100%; font-size: .93em; }
th, td { text-align: left; padding: .2em .6em; vertical-align: top;
  border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1em 0; break-inside: avoid; }
svg { width: 100%; height: auto; }
figcaption, .small { font-size: .88em; color: #444; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5em; }
.beside { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.8em;
  align-items: start; }
.beside table { font-size: .78em; line-height: 1.3; }
.beside th, .beside td { padding: .12em .3em; }
code { font-size: .9em; background: #f3f3f3; padding: 0 .2em; }
pre { font-size: .85em; background: #f3f3f3; padding: .6em .8em;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 9.5pt; }
  h1, h2 { margin: 1em 0 .5em; break-after: avoid; }
  .beside table { line-height: 1.2; }
  .beside th, .beside td { padding: .05em .3em; }
  figure { margin: .6em 0; } ul { margin: .5em 0; }
  .plots { grid-template-columns: 1fr 1fr 1fr; gap: 0 1em; }
  figcaption { font-size: .8em; line-height: 1.25; }
  tr, pre, .claim { break-inside: avoid; } }
@page { margin: 16mm; }
"""

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# Longer tables stand in two halves, side by side.
_LONG_TABLE = 24


def document(title: str, parts: Sequence[str]) -> str:
  """The page.

  Args:
    title: as text.
    parts: of its body, as HTML.
  """
  body = "\n".join(parts)
  title = html.escape(title)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{title}</title><style>{_STYLE}</style></head>\n"
    f"<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
  )


def claim(text: str) -> str:
  """What the page says, in a few sentences."""
  return f'<p class="claim">{html.escape(text)}</p>'


def terms(rows: Sequence[tuple[str, str]]) -> str:
  """Names and values in two columns."""
  cells = "".join(
    f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
    for name, value in rows
  )
  return f"<table>{cells}</table>"


def columns(
  names: Sequence[str],
  rows: Sequence[Sequence[str]],
  numeric: Collection[int],
) -> str:
  """A table with a head, which is printed again on each page.

  Args:
    names: of the columns.
    rows: as texts.
    numeric: which columns hold numbers, from 0.
  """

  def row(cells: Sequence[str], tag: str) -> str:
    return "".join(
      f"<{tag}{' class=n' if i in numeric else ''}>{html.escape(c)}</{tag}>"
      for i, c in enumerate(cells)
    )

  body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
  return (
    f"<table><thead><tr>{row(names, 'th')}</tr></thead>"
    f"<tbody>{body}</tbody></table>"
  )


def long_columns(
  names: Sequence[str],
  rows: Sequence[Sequence[str]],
  numeric: Collection[int],
) -> str:
  """`columns`, in two halves side by side where it would be long."""
  if len(rows) <= _LONG_TABLE:
    return columns(names, rows, numeric)
  middle = -(-len(rows) // 2)
  halves = (
    columns(names, part, numeric) for part in (rows[:middle], rows[middle:])
  )
  return f'<div class="beside">{"".join(halves)}</div>'


def bullets(texts: Sequence[str]) -> str:
  """A list of texts."""
  return "<ul>" + "".join(f"<li>{html.escape(t)}</li>" for t in texts) + "</ul>"


def plots(drawn: Sequence[tuple[Callable[[Any], None], str]]) -> str:
  """Plots in two columns.

  Args:
    drawn: pairs of a function that draws into matplotlib axes and a caption,
      which may be empty.
  """
  figures = ""
  for draw, caption in drawn:
    told = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    figures += f"<figure>{_drawing(draw)}{told}</figure>"
  return f'<div class="plots">{figures}</div>'


def _drawing(draw: Callable[[Any], None]) -> str:
  """One plot as SVG that stands alone."""
  import matplotlib as mpl
  from matplotlib import figure

  with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dptrain"}):
    canvas = figure.Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = canvas.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata=_NO_METADATA)
  # Without the XML declaration, which has no place inside a page.
  _, start, rest = text.getvalue().partition("<svg")
  return start + rest
