"""The number of CPU cores available to this process, by its affinity mask and its container's quota."""

import os
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores, at least 1. root: where Linux's /proc and /sys are."""
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
