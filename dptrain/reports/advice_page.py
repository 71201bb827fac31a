"""Advice as one self-contained page."""

import html
from typing import Any

from dptrain.reports import advice as advice_lib
from dptrain.reports import layout
from dptrain.reports import page
from dptrain.reports import scaling_law


def make_page(made: advice_lib.Advice) -> str:
  """The page of an advice, as HTML; it loads nothing from anywhere."""
  typed = "\n".join(layout.typed(made.command()))
  parts = [
    page.claim(made.caveat()),
    "<h2>The budget</h2>",
    page.terms(made.asked()),
    "<h2>What the paper predicts</h2>",
    page.terms(made.predicted()),
    "<h2>dptrain's own price of those updates</h2>",
    page.terms(made.own()),
  ]
  if made.warnings:
    parts += ["<h2>Beware</h2>", page.bullets(made.warnings)]
  parts += [
    "<h2>What it is read off</h2>",
    _plots(made.prediction),
    _table(),
    "<h2>To go on from here</h2>",
    f"<pre>{html.escape(typed)}</pre>",
  ]
  return page.document("Advice by a scaling law", parts)


def _plots(prediction: scaling_law.Prediction) -> str:
  rows: dict[float, list[scaling_law.Point]] = {}
  for point in scaling_law.table():
    rows.setdefault(point.epsilon, []).append(point)
  asked = prediction.saturating

  def compute(axes: Any) -> None:
    for epsilon, points in rows.items():
      axes.plot(
        [p.num_examples for p in points],
        [p.flops for p in points],
        ".-",
        label=f"epsilon {epsilon:g}",
      )
    axes.plot([asked.num_examples], [asked.flops], "ko", mfc="none", ms=9)
    axes.set(xlabel="records", ylabel="FLOPs", xscale="log", yscale="log")
    axes.legend(frameon=False)

  def loss(axes: Any) -> None:
    for points in rows.values():
      axes.plot(
        [p.num_examples for p in points], [p.loss for p in points], ".-"
      )
    axes.plot([asked.num_examples], [asked.loss], "ko", mfc="none", ms=9)
    axes.set(xlabel="records", ylabel="cross-entropy", xscale="log", ylim=0)

  return page.plots(
    [
      (compute, "Saturating compute of the table; the ring is your budget's."),
      (loss, "The cross-entropy of the table, on the paper's corpus."),
    ]
  )


def _table() -> str:
  names = [
    "records",
    "epsilon",
    "FLOPs",
    "cross-entropy",
    "parameters",
    "updates",
    "batch",
  ]
  rows = [
    [
      f"{p.num_examples:.0e}",
      f"{p.epsilon:g}",
      f"{p.flops:.1e}",
      f"{p.loss:.2f}",
      f"{p.parameters:.1e}",
      f"{p.steps:,.0f}",
      f"{p.batch_size:,.0f}",
    ]
    for p in scaling_law.table()
  ]
  source = f'<p class="small">{html.escape(scaling_law.SOURCE)}:</p>'
  return source + page.columns(names, rows, range(len(names)))
