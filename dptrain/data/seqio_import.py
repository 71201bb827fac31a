"""Late and quiet import of seqio, which pulls in TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import importlib
import os
import sys
import tempfile
from types import ModuleType

_waiting: list[Callable[[], None]] = []


def when_seqio_is_needed(action: Callable[[], None]) -> None:
  """Postpones `action`, such as a registration, to the next `import_seqio`.

  So that naming a task costs nothing until its documents are read.

  Args:
    action: called once, with seqio imported.
  """
  _waiting.append(action)


def import_seqio() -> ModuleType:
  """Imports seqio without TensorFlow's chatter and without its hold on GPUs.

  The first call takes several seconds; later calls are free. What TensorFlow
  prints while it starts is dropped unless the import fails.

  Returns:
    The `seqio` module.
  """
  seqio = _import_seqio()
  while _waiting:
    _waiting.pop(0)()
  return seqio


def _import_seqio() -> ModuleType:
  """`import_seqio` without what waits for it."""
  if "seqio" in sys.modules:
    return sys.modules["seqio"]
  # Both must stand in the environment before TensorFlow's libraries load.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  with _native_stderr_held_back():
    tensorflow = importlib.import_module("tensorflow")
    # RuntimeError: the host program started TensorFlow's devices itself.
    with contextlib.suppress(RuntimeError):
      # TensorFlow would otherwise take the memory that JAX needs.
      tensorflow.config.set_visible_devices([], "GPU")
    return importlib.import_module("seqio")


def import_tensorflow() -> ModuleType:
  """Imports TensorFlow under the rules of `import_seqio`.

  Returns:
    The `tensorflow` module.
  """
  import_seqio()
  return importlib.import_module("tensorflow")


@contextlib.contextmanager
def _native_stderr_held_back() -> Iterator[None]:
  """Holds back file descriptor 2; shows what it held if the body raises."""
  # TensorFlow's C++ start-up lines ignore every documented log level.
  sys.stderr.flush()
  with tempfile.TemporaryFile() as held:
    saved = os.dup(2)
    os.dup2(held.fileno(), 2)
    try:
      yield
    except BaseException:
      held.seek(0)
      os.write(saved, held.read())
      raise
    finally:
      os.dup2(saved, 2)
      os.close(saved)
