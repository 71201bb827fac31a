"""Several processes that train as one: who writes, who waits, who agrees.

Process 0 alone writes into MODEL_DIR (checkpoints apart, which Orbax writes
together). Whatever only it can know, the ledger's branch, say, or that an
update is written down, reaches the others through the functions below; so do
its errors, and theirs it. With one process each of them is a plain call.

All functions but `start` must be called by all processes in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import signal
import time
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

_T = TypeVar("_T")
# A process that is killed is missed after so long; all others end then.
_HEARTBEAT_SECONDS = 30
_MESSAGE_BYTES = 1024
_SHARED_FILE_SECONDS = 20


class ElsewhereError(RuntimeError):
  """Another process failed; the text is its own error's."""


def start(coordinator_address: str, count: int, index: int) -> None:
  """Joins this process to the others; before jax computes anything.

  Args:
    coordinator_address: host:port at which process 0 is reached.
    count: number of processes.
    index: of this one, from 0.

  Raises:
    ValueError: numbers out of range, or an address without a port.
    RuntimeError: process 0 was not reached.
  """
  if count < 1 or not 0 <= index < count:
    raise ValueError(
      f"--process_index={index} must lie in [0, {count}), {count} being"
      " --process_count."
    )
  if not coordinator_address.rpartition(":")[2].isdigit():
    raise ValueError(
      f"--coordinator_address={coordinator_address} has no port: write"
      " HOST:PORT, the address of process 0."
    )
  # The default, but the environment may have chosen otherwise.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    coordinator_address,
    count,
    index,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=2 * _HEARTBEAT_SECONDS,
  )


def is_first() -> bool:
  """Whether this is process 0: the one that writes and speaks."""
  return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
  """What each process gave, in their order.

  Args:
    value: plain data for JSON; not secret.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = _MESSAGE_BYTES
  while True:
    # One round for short messages; the sizes come along.
    message = np.zeros(size + 8, np.uint8)
    message[:8] = np.frombuffer(np.int64(len(data)).tobytes(), np.uint8)
    message[8 : 8 + len(data)] = data[:size]
    rows = multihost_utils.process_allgather(message)
    sizes = [int(np.frombuffer(row[:8].tobytes(), np.int64)[0]) for row in rows]
    if max(sizes) <= size:
      return [
        json.loads(row[8 : 8 + length].tobytes())
        for row, length in zip(rows, sizes, strict=True)
      ]
    size = max(sizes)


class _Outcome(NamedTuple):
  value: Any
  error: BaseException | None


def _tried(make: Callable[[], _T]) -> _Outcome:
  try:
    return _Outcome(make(), None)
  except Exception as error:
    return _Outcome(None, error)


def _shared(outcome: _Outcome, told: Any = None) -> list[Any]:
  """Raises on all processes if one failed; else what each of them `told`."""
  mine = str(outcome.error) if outcome.error is not None else None
  rows = gathered([mine, told])
  if outcome.error is not None:
    raise outcome.error
  for process, (error, _) in enumerate(rows):
    if error is not None:
      raise ElsewhereError(f"process {process}: {error}")
  return [row[1] for row in rows]


def first(make: Callable[[], _T]) -> _T:
  """Runs `make` on process 0 alone.

  Formal guarantee: no process returns before `make` has returned on process 0:
  what it wrote is written. If process 0 dies in it, none ever returns.

  Args:
    make: returns plain data for JSON.

  Returns:
    What it returned, on all processes.

  Raises:
    ElsewhereError: on the others, if it raised on process 0.
  """
  if jax.process_count() == 1:
    return make()
  outcome = _tried(make) if is_first() else _Outcome(None, None)
  value: _T = _shared(outcome, outcome.value)[0]
  return value


def everywhere(make: Callable[[], _T]) -> _T:
  """Runs `make` on all processes, each with its own result; all or none."""
  if jax.process_count() == 1:
    return make()
  outcome = _tried(make)
  _shared(outcome)
  value: _T = outcome.value
  return value


def in_turn(make: Callable[[], _T]) -> _T:
  """As `everywhere`, but process 0 is done before the others begin."""
  if jax.process_count() == 1:
    return make()
  outcome = _tried(make) if is_first() else _Outcome(None, None)
  _shared(outcome)
  if not is_first():
    outcome = _tried(make)
  _shared(outcome)
  value: _T = outcome.value
  return value


def check_equal(what: str, told: Mapping[str, Any]) -> None:
  """Refuses processes that tell different things.

  Args:
    what: of which these are the parts, for the message.
    told: plain data by name.

  Raises:
    ValueError: on all processes; names each difference.
  """
  rows = gathered(dict(told))
  for process, row in enumerate(rows):
    found = [
      f"{name} is {_short(row.get(name))} there and"
      f" {_short(rows[0].get(name))} in process 0"
      for name in sorted({*row, *rows[0]})
      if row.get(name) != rows[0].get(name)
    ]
    if found:
      raise ValueError(
        f"process {process} has other {what} than process 0: "
        f"{'; '.join(found)}. Start all {len(rows)} processes with the same"
        " command, code and files."
      )


def comparable(settings: Any) -> dict[str, str]:
  """A settings dataclass as text by field; fields without a text left out."""
  told = {
    field.name: repr(getattr(settings, field.name))
    for field in dataclasses.fields(settings)
  }
  # Functions and the like print as an address, which no two processes share.
  return {name: text for name, text in told.items() if " at 0x" not in text}


def check_shared(directory: pathlib.Path) -> None:
  """Refuses a MODEL_DIR that is not the same folder for all processes.

  Raises:
    ValueError: on all processes, if one of them does not see process 0's.
  """
  if jax.process_count() == 1:
    return
  mark = first(lambda: f".shared_{secrets.token_hex(8)}")
  first(lambda: (directory / mark).write_text("see processes.check_shared"))

  def look() -> None:
    end = time.monotonic() + _SHARED_FILE_SECONDS
    while not (directory / mark).exists():
      # A network file system may take a while to show it.
      if time.monotonic() > end:
        raise ValueError(
          f"MODEL_DIR={directory} is not the folder that process 0 sees under"
          " that name: all processes must share it, through a network file"
          " system if they run on several machines."
        )
      time.sleep(0.1)

  try:
    everywhere(look)
  finally:
    if is_first():
      (directory / mark).unlink(missing_ok=True)


def stop_asked(counter: int) -> bool:
  """Whether all processes shall stop here, since one of them was asked to.

  Costs no message while nobody asks. The answer is yes on all processes at the
  same `counter`.

  Args:
    counter: how often this was called before; the same on all processes.
  """
  if jax.process_count() == 1:
    return False
  return multihost_utils.reached_preemption_sync_point(counter)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Lets SIGTERM and Ctrl-C end a run after saving.

  One process: both raise KeyboardInterrupt at once. Several: a SIGTERM to any
  of them is what `stop_asked` tells to all (jax listens to it), and Ctrl-C is
  turned into one; a second Ctrl-C ends this process as it is.
  """
  several = jax.process_count() > 1

  def interrupt(*_: object) -> None:
    raise KeyboardInterrupt

  def ask(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)

  number = signal.SIGINT if several else signal.SIGTERM
  try:
    before = signal.signal(number, ask if several else interrupt)
  except ValueError:  # not the main thread: leave signals alone
    yield
    return
  try:
    yield
  finally:
    signal.signal(number, before)


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
