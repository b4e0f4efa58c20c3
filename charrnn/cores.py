"""CPU cores: how many this process may use, and how many of them other processes leave to it."""

import math
import os
from pathlib import Path
from time import perf_counter, process_time

# A process that computes and has a lower share of its threads' time on the cores shares them with other processes;
# threads that wait for each other sleep 5 to 10% of the time.
UNDISTURBED = 0.8

_STAT = Path("/proc/stat")
# Linux counts in hundredths of a second, so that this errs by up to a quarter of a core.
_SHORTEST_S = 0.04


def cores(root: Path = Path("/")) -> int:
    """Return the cores of this process's affinity mask, at most its container's quota, and at least 1.

    Args:
        root: Where Linux's /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> list[float]:
    """Return the quotas of this process's control groups, in cores: cpu.max of version 2, cfs_quota_us of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        # A container may see the path that its host knows; its own group is then the top.
        for folder in [top, *(f for f in (group, *group.parents) if top in f.parents)]:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            try:
                words = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
                quota, period = map(float, words)
            except (OSError, ValueError):  # not there, or max: no quota
                continue
            if quota > 0 and period > 0:
                quotas.append(quota / period)
    return quotas


def free_cores() -> float:
    """Return the cores that no other process used, on average since this module was imported.

    Infinity where it is not known: not on Linux, or the import was a moment ago.
    """
    now = _seconds()
    if _AT_IMPORT is None or now is None:
        return math.inf
    elapsed, idle, own = (after - before for before, after in zip(_AT_IMPORT, now, strict=True))
    return (idle + own) / elapsed if elapsed >= _SHORTEST_S else math.inf


def _seconds() -> tuple[float, float, float] | None:
    """Return the time by the clock, of all cores' idling since the machine started, and of this process's work."""
    try:
        with _STAT.open("rb") as file:
            idle, waiting_for_disks = map(int, file.readline().split()[4:6])
    except (OSError, ValueError):
        return None
    # A sandbox that counts nothing shows zeros.
    return (perf_counter(), (idle + waiting_for_disks) / os.sysconf("SC_CLK_TCK"), process_time()) if idle else None


_AT_IMPORT = _seconds()
