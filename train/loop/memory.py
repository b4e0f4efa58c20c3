"""Memory that a step frees is kept for the next one.

glibc gives blocks above 32 MiB back to the system as soon as they are freed, and asks for them again in the next step:
the system must then clear them, 4 KiB at a time, which is up to a quarter of a step's time on a CPU. What is kept is
what the largest step needed.
"""

import ctypes
import platform

# From malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK = 2**30
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has this process keep what it frees, blocks above 1 GiB apart; False where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
