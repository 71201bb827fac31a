"""Programs that train beside each other on this machine: one view, one end."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import re
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import tqdm

from dptrain.training import progress as progress_lib

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.2
# What a program's bar is asked to say, and how often its log keeps it.
_BAR_SECONDS = 0.5
_BAR_LOG_SECONDS = 15.0
# A second Ctrl-C sooner than this is the first one, by two roads.
_AGAIN_SECONDS = 1.0
_LINE_END = re.compile(rb"[\r\n]")
_BAR = re.compile(r"[^|]*\d+%\|.*\|\s*(\d+)/(\d+) \[(.*)\]\s*")
_EPSILON = re.compile(r"\bepsilon=([\d.]+|inf)\b")

# Becomes the program, which so gets no Ctrl-C but what its launcher makes of
# it, and ends (saving) if the launcher is killed. By a program of its own:
# nothing may run between fork and exec of a process that has threads.
_BOUND = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
  signal.signal(number, signal.SIG_IGN)
if sys.platform == "linux":
  import ctypes
  PR_SET_PDEATHSIG = 1
  ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
if os.getppid() != int(sys.argv[1]):
  sys.exit("the launcher has died")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Order(NamedTuple):
  """A program to start.

  Attributes:
    name: in words.
    command: its argument vector, an absolute path first.
    log: file to which what it says is appended.
  """

  name: str
  command: Sequence[str]
  log: pathlib.Path


@dataclasses.dataclass
class Outcome:
  """What became of a program.

  Attributes:
    name: of its `Order`.
    log: of its `Order`.
    status: how it ended, as in `subprocess`: negative for a signal.
    step: updates made, by its bar; None if it showed none.
    epsilon: spent, by its bar.
    last_words: the last line on its stderr that is no bar.
    summary: lines on its stdout.
  """

  name: str
  log: pathlib.Path
  status: int | None = None
  step: int | None = None
  epsilon: float | None = None
  last_words: str = ""
  summary: list[str] = dataclasses.field(default_factory=list)

  def ended(self) -> str:
    """How it ended, in words."""
    if self.status is None or self.status >= 0:
      return f"ended with status {self.status}"
    name = signal.Signals(-self.status).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


class View:
  """One bar over the updates of all programs, and what they say above it."""

  def __init__(self, total: int, epsilon: str):
    """Opens the bar.

    Args:
      total: updates of all programs together.
      epsilon: what the largest epsilon of theirs is called.
    """
    self._epsilon, self._steps = epsilon, dict[str, int]()
    self._bar = tqdm.tqdm(
      total=total,
      unit="update",
      # As `progress.Progress` does it.
      mininterval=0.5 if sys.stderr.isatty() else 15,
      dynamic_ncols=True,
      smoothing=0.1,
    )

  def close(self) -> None:
    """Ends the bar."""
    self._bar.close()

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    progress_lib.say(text)

  def show(self, outcomes: Sequence[Outcome]) -> None:
    """Moves the bar to where the programs are."""
    made = 0
    for each in outcomes:
      if each.step is None:
        continue
      if each.name not in self._steps:
        # Made by an earlier call of the same command.
        self._bar.initial += each.step
        self._bar.n += each.step
        self._bar.last_print_n += each.step  # else they count as its speed
        self._steps[each.name] = each.step
      made += each.step - self._steps[each.name]
      self._steps[each.name] = each.step
    parts = [f"{o.name}: {o.step}" for o in outcomes if o.step is not None]
    spent = [e.epsilon for e in outcomes if e.epsilon is not None]
    if spent:
      parts.append(f"{self._epsilon} {max(spent):.3f}")
    self._bar.set_postfix_str(", ".join(parts), refresh=False)
    self._bar.update(made)


def run(orders: Sequence[Order], view: View) -> tuple[list[Outcome], bool]:
  """Starts programs and waits for all; one that dies stops no other.

  SIGTERM, SIGHUP and Ctrl-C are answered by SIGTERM to all programs, which are
  then waited for; a second Ctrl-C kills them. If this process is killed, they
  get SIGTERM (on Linux).

  Args:
    orders: what to start.
    view: where their progress is shown.

  Returns:
    How each ended, and whether all were asked to end.

  Raises:
    OSError: one cannot be started; those before it are ended.
  """
  programs: list[_Program] = []
  with _listening() as asked, contextlib.ExitStack() as stack:
    for order in orders:
      programs.append(stack.enter_context(_started(order, view)))
    _watch(programs, view, asked)
  return [each.outcome for each in programs], asked.at is not None


class _Asked:
  """Handles signals that ask this process to end."""

  def __init__(self) -> None:
    self.at: float | None = None
    self.again = False

  def __call__(self, number: int, frame: Any) -> None:
    del frame
    now = time.monotonic()
    if self.at is None:
      self.at = now
    elif number == signal.SIGINT and now - self.at > _AGAIN_SECONDS:
      self.again = True


@contextlib.contextmanager
def _listening() -> Iterator[_Asked]:
  asked = _Asked()
  before: dict[int, Any] = {}
  try:
    for number in _ENDING:
      # Who started this with a signal ignored (nohup, &) means it.
      if signal.getsignal(number) is not signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
          before[number] = signal.signal(number, asked)
    yield asked
  finally:
    for changed, handler in before.items():
      signal.signal(changed, handler)


def _watch(programs: "list[_Program]", view: View, asked: _Asked) -> None:
  """Until all have ended."""
  terminated = killed = False
  with selectors.DefaultSelector() as selector:
    for program in programs:
      for pipe in program.pipes:
        selector.register(pipe, selectors.EVENT_READ, program)
    running = list(programs)
    while running:
      for key, _ in selector.select(_POLL_SECONDS):
        if not key.data.read(key.fileobj):
          selector.unregister(key.fileobj)
      for program in [p for p in running if p.process.poll() is not None]:
        running.remove(program)
        program.finish()
        open_pipes = selector.get_map()
        for pipe in program.pipes:
          if pipe in open_pipes:  # a program of its own still holds it
            selector.unregister(pipe)
        if program.outcome.status and running and not terminated:
          view.say(
            f"{program.outcome.name} {program.outcome.ended()}; the others go"
            " on"
          )
      view.show([program.outcome for program in programs])
      if asked.at is not None and not terminated:
        terminated = True
        view.say(
          "asked to end: waiting until all replicas have saved (Ctrl-C again"
          " kills them: updates since their last checkpoints are then made"
          " again, at no cost)"
        )
        for program in running:
          program.process.terminate()
      if asked.again and not killed:
        killed = True
        for program in running:
          program.process.kill()


@contextlib.contextmanager
def _started(order: Order, view: View) -> "Iterator[_Program]":
  """A program that does not outlive this context."""
  bound = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid())]
  with (
    open(order.log, "ab", buffering=0) as log,
    subprocess.Popen(
      [*bound, *order.command],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=_environment(os.environ),
      bufsize=0,
    ) as process,
  ):
    program = _Program(Outcome(order.name, order.log), process, log, view)
    try:
      yield program
    finally:
      if process.poll() is None:
        process.terminate()


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
  """Whole bars, often."""
  told = {k: v for k, v in ours.items() if k not in ("COLUMNS", "LINES")}
  return told | {progress_lib.INTERVAL_VARIABLE: f"{_BAR_SECONDS}"}


class _Program:
  """A process, and who hears what it says."""

  def __init__(
    self,
    outcome: Outcome,
    process: subprocess.Popen[bytes],
    log: Any,
    view: View,
  ):
    self.outcome, self.process = outcome, process
    self._log, self._view = log, view
    self._begun = {process.stdout: b"", process.stderr: b""}
    self._bar_logged = -_BAR_LOG_SECONDS
    self._bar_left = ""  # not in the log yet
    self._log_failed = False
    for pipe in self.pipes:
      os.set_blocking(pipe.fileno(), False)

  @property
  def pipes(self) -> tuple[Any, ...]:
    return tuple(self._begun)

  def read(self, pipe: Any) -> bool:
    """Takes what has been said; False at its end."""
    try:
      data = os.read(pipe.fileno(), 1 << 16)
    except BlockingIOError:
      return False
    *lines, self._begun[pipe] = _LINE_END.split(self._begun[pipe] + data)
    for line in lines:
      self._hear(line, pipe)
    # A bar's line ends when the next one begins: read it at once.
    self._read_bar(_text(self._begun[pipe]))
    return bool(data)

  def finish(self) -> None:
    """Takes what is left to say, of a process that has ended."""
    for pipe in self.pipes:
      while self.read(pipe):
        pass
      self._hear(self._begun[pipe], pipe)
      self._begun[pipe] = b""
    self._log_bar()
    self.outcome.status = self.process.returncode

  def _hear(self, line: bytes, pipe: Any) -> None:
    text = _text(line).rstrip()
    if not text:
      return
    if _BAR.fullmatch(text):
      self._read_bar(text)
      self._bar_left = text
      if time.monotonic() - self._bar_logged >= _BAR_LOG_SECONDS:
        self._log_bar()
      return
    if pipe is self.process.stdout:
      self.outcome.summary.append(text)
    else:
      self.outcome.last_words = text
      self._view.say(f"{self.outcome.name}: {text}")
    self._log_bar()
    self._write(text)

  def _log_bar(self) -> None:
    """Logs the newest of the bars, if it is not there."""
    if self._bar_left:
      self._write(self._bar_left)
      self._bar_logged, self._bar_left = time.monotonic(), ""

  def _read_bar(self, text: str) -> None:
    found = _BAR.fullmatch(text)
    if not found or "update" not in found[3]:  # a bar of something else
      return
    self.outcome.step = int(found[1])
    if epsilon := _EPSILON.search(found[3]):
      self.outcome.epsilon = float(epsilon[1])

  def _write(self, line: str) -> None:
    try:
      self._log.write(f"{line}\n".encode())
    except OSError as error:
      if not self._log_failed:
        self._log_failed = True
        self._view.say(
          f"{self.outcome.log} cannot be written ({error}): training goes on"
        )


def _text(line: bytes) -> str:
  return line.decode(errors="replace")
