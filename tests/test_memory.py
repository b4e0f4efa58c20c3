"""Freed memory is kept: the next step's blocks cost no page fault."""

import platform
import subprocess
import sys

import pytest

from train.loop.memory import keep_freed_memory

FAULTS = """
import ctypes, resource, sys
from train.loop.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(64 << 20) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 20)
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_only_kept_memory_is_used_again_without_page_faults():
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "plain")
    }
    pages = (128 << 20) // 4096
    assert faults["keep"] < pages / 100
    assert faults["plain"] > pages / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
