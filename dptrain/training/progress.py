"""What a person sees of a run: a bar, TensorBoard, a summary."""

from collections.abc import Iterator, Mapping
import contextlib
import logging
import os
import pathlib
import sys
from typing import Any

import tqdm

from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import layout
from dptrain.reports import report
from dptrain.training import processes
from dptrain.training import run as run_lib

# Seconds between two of the bar's lines where stderr is no terminal.
INTERVAL_VARIABLE = "DPTRAIN_PROGRESS_SECONDS"


class Progress:
  """A progress bar and TensorBoard curves, of the first process alone.

  Only public figures by default: examples are *expected* examples, since the
  realised batch sizes are private.
  """

  def __init__(
    self, directory: pathlib.Path | None, total_steps: int, start: int
  ):
    """Opens the bar.

    Args:
      directory: where TensorBoard's folder goes; None for no curves.
      total_steps: updates of the whole run.
      start: updates already made.
    """
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=start,
      unit="update",
      # A log file gets a line now and then instead of a moving bar.
      mininterval=0.5
      if sys.stderr.isatty()
      else float(os.environ.get(INTERVAL_VARIABLE, "15")),
      dynamic_ncols=True,
      smoothing=0.1,
      disable=not processes.is_first(),
    )
    self._directory = directory if processes.is_first() else None
    self._writer: Any = None
    self._shown: dict[str, str] = {}
    self._expected_examples = 0

  def close(self) -> None:
    """Ends the bar and flushes the curves."""
    self._bar.close()
    if self._writer is not None:
      self._writer.close()

  def advance(self, expected_batch_size: int) -> None:
    """One update was made."""
    self._expected_examples += expected_batch_size
    self._bar.update()
    if self._bar.disable:
      return
    seconds = self._bar.format_dict["elapsed"]
    if seconds:
      self._shown["examples/s"] = f"{self._expected_examples / seconds:.0f}"
    self._bar.set_postfix(self._shown, refresh=False)

  def show(self, **values: str) -> None:
    """Puts figures beside the bar, until they are replaced."""
    self._shown.update(values)
    if self._bar.disable:
      return
    self._bar.set_postfix(self._shown, refresh=False)

  def curves(self, step: int, values: Mapping[str, float]) -> None:
    """Writes TensorBoard points."""
    if self._directory is None:
      return
    if self._writer is None:
      # TensorFlow takes seconds to import: only who logs pays.
      from dptrain.data.seqio_import import import_tensorflow

      import_tensorflow()
      from clu import metric_writers

      self._writer = metric_writers.SummaryWriter(
        str(self._directory / "tensorboard")
      )
    self._writer.write_scalars(step, dict(values))
    self._writer.flush()


def say(text: str) -> None:
  """Prints a line on stderr, above the bar if there is one; once for all."""
  if processes.is_first():
    tqdm.tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def logs_said() -> Iterator[None]:
  """Says what dptrain's modules log: what an optimizer leaves alone, say."""
  logger, handler = logging.getLogger("dptrain"), _Said(logging.INFO)
  before = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.propagate = before[1]


class _Said(logging.Handler):
  def emit(self, record: logging.LogRecord) -> None:
    say(record.getMessage())


def write_report(ledger: ledger_lib.Ledger, directory: pathlib.Path) -> bool:
  """Rewrites the privacy report; a full disk is told and ends nothing.

  Args:
    ledger: of MODEL_DIR.
    directory: MODEL_DIR.

  Returns:
    Whether it is written.
  """
  try:
    report.write_report(ledger, directory)
  except OSError as error:
    say(
      f"the privacy report could not be written ({error}); training goes on,"
      f" and `dptrain report {directory}` can make it from the ledger"
    )
    return False
  return True


def summary(
  result: run_lib.TrainingResult, directory: pathlib.Path, claim: bool
) -> str:
  """The last words of a run, for people."""
  lines = [
    f"updates                {result.step:,}"
    + (f" (stopped: {result.stopped})" if result.stopped else ""),
    f"examples seen          {result.expected_examples:,} (expected; the exact"
    " number is private)",
  ]
  if result.accuracy is not None and result.baseline_accuracy is not None:
    lines.append(
      f"validation accuracy    {100 * result.accuracy:.2f} %   (always"
      " guessing the most frequent token:"
      f" {100 * result.baseline_accuracy:.2f} %)"
    )
  claimed = "" if claim else "   FIXED SEED: NO PRIVACY CLAIM"
  lines += [
    f"privacy                epsilon {layout.rounded_up(result.epsilon)}, delta"
    f" {result.delta:g}{claimed}",
    f"model                  {directory / 'checkpoints'}",
    f"privacy report         {directory / 'privacy_report.txt'}",
  ]
  return "\n".join(lines)
