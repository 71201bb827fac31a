"""The allocator keeps what it has: seen from outside, by the system's count."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from dptrain.training import host_memory
if sys.argv[1] == "keep":
  assert host_memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
size = 200 * 2**20
def touch():
  block = libc.malloc(ctypes.c_size_t(size))
  ctypes.memset(block, 1, size)
  libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told"
)
def test_memory_is_used_again_without_asking_the_system():
  faults = {
    mode: int(
      subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        capture_output=True,
        text=True,
        check=True,
      ).stdout
    )
    for mode in ("keep", "leave")
  }
  # 200 MB come in at least 100 (huge) pages, if they come from the system.
  assert faults["leave"] >= 100
  assert faults["keep"] < 50
