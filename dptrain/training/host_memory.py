"""The C library's allocator, told to keep what it has.

XLA on CPU asks for temporary memory at every call of a program. glibc takes
blocks of more than 32 MB fresh from the system each time, and the system zeroes
them page by page: for small models that is much of a step's time.
"""

import ctypes
import sys

_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
  """Lets freed memory be used again instead of going back to the system.

  For a whole process, and for good: call it in programs, not in libraries. The
  peak of a process's memory stays; what it has once used, it keeps.

  Returns:
    Whether the allocator understood; only glibc's does.
  """
  if not sys.platform.startswith("linux"):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  largest = 2**31 - 1
  return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, largest))
