"""Free cores: how many of them other processes leave to this one. Linux counts them; elsewhere nothing is known."""

import math
import os
from pathlib import Path
from time import perf_counter, process_time

_STAT = Path("/proc/stat")
# Linux counts in hundredths of a second, so that this errs by up to a quarter of a core.
_SHORTEST_S = 0.04


def free_cores() -> float:
    """Cores that no other process used, on average since this module was imported, which `import infer` does.

    Returns: infinity where it is not known: not on Linux, or the import was a moment ago.
    """
    now = _seconds()
    if _AT_IMPORT is None or now is None:
        return math.inf
    elapsed, idle, own = (after - before for before, after in zip(_AT_IMPORT, now, strict=True))
    return (idle + own) / elapsed if elapsed >= _SHORTEST_S else math.inf


def _seconds() -> tuple[float, float, float] | None:
    """By the clock, of all cores' idling since the machine started, and of this process's computing."""
    try:
        with _STAT.open("rb") as file:
            idle, waiting_for_disks = map(int, file.readline().split()[4:6])
    except (OSError, ValueError):
        return None
    # A sandbox that counts nothing shows zeros.
    return (perf_counter(), (idle + waiting_for_disks) / os.sysconf("SC_CLK_TCK"), process_time()) if idle else None


_AT_IMPORT = _seconds()
