"""CPU cores: those allowed by control groups, those free, and the number of threads that an engine takes by it."""

import math
import os
import subprocess
import sys

import pytest
from launches import python

from charrnn import cores
from infer import Engine, engine
from infer.engine import default_threads
from infer.model_file.loader import default_model


@pytest.fixture
def later(tmp_path, monkeypatch):
    """Sets what `cores` sees: seconds since its import by the clock and of this process, and what /proc/stat is now."""

    def see(elapsed, own, stat):
        monkeypatch.setattr(cores, "_STAT", tmp_path / "stat")
        if stat is not None:
            cores._STAT.write_text(stat)
        monkeypatch.setattr(cores, "perf_counter", lambda: 1000 + elapsed)
        monkeypatch.setattr(cores, "process_time", lambda: 10 + own)
        monkeypatch.setattr(cores, "_AT_IMPORT", (1000.0, 500.0, 10.0))

    return see


def stat(idle, waiting=0.0):
    hertz = os.sysconf("SC_CLK_TCK")
    return f"cpu  7 0 7 {round(idle * hertz)} {round(waiting * hertz)} 0 0 0 0 0\ncpu0 7 0 7 1 1 0 0 0 0 0\n"


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="os.sysconf is Unix's")
@pytest.mark.parametrize(
    ("elapsed", "own", "now", "free"),
    [
        (0.5, 0.5, stat(300.5, 200), 2),
        (0.5, 0.25, stat(300.5, 200.25), 2),  # which waits for disks
        (0.5, 0.5, stat(300, 200), 1),
        (0.5, 0.25, stat(300, 200), 0.5),
        (0.5, 0.5, stat(303.5, 200), 8),
        *((0.5, 0.5, unknown, math.inf) for unknown in (None, "", "cpu 1 2\n", "cpu a b c d e f\n", stat(0))),
        (0.03, 0.03, stat(500), math.inf),  # too short to know
    ],
)
def test_cores_are_free_that_idle_or_work_for_this_process(later, elapsed, own, now, free):
    later(elapsed, own, now)
    assert cores.free_cores() == pytest.approx(free)


def test_the_count_begins_before_what_is_slow_to_import():
    code = "import sys, infer; assert 'charrnn.cores' in sys.modules and 'numpy' not in sys.modules"
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize(
    ("allowed", "free", "threads"),
    [(2, 1.0, 1), (2, 0.3, 1), (2, 1.4, 1), (2, 1.8, 2), (2, math.inf, 2), (8, 3.1, 3), (8, 7.9, 4), (1, 8, 1)],
)
def test_a_large_model_takes_the_cores_that_are_free(monkeypatch, allowed, free, threads):
    monkeypatch.setattr(engine, "cores", lambda: allowed)
    monkeypatch.setattr(engine, "free_cores", lambda: free)
    assert default_threads(default_model(), 1) == threads


def test_a_small_model_takes_one_thread_unless_more_are_asked_for(monkeypatch, gru):
    for free in (64.0, 0.0):
        monkeypatch.setattr(engine, "free_cores", lambda free=free: free)
        assert default_threads(gru.path, 1) == 1
        assert Engine(gru.path, threads=2).threads == 2


ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
RATIO = """
import infer
from infer import Engine
from infer.bench import chars_per_s
from charrnn.sampling import SamplingOptions

chosen, one = Engine(), Engine(threads=1)
speeds = [[chars_per_s(engine, 1, SamplingOptions()) for engine in (chosen, one)] for _ in range(3)]
print(chosen.threads, max(a / b for a, b in speeds))
"""


@pytest.mark.slow
@pytest.mark.skipif(not 1 < ALLOWED == os.cpu_count(), reason="needs Linux, and all of two or more cores")
def test_beside_processes_that_leave_one_core_the_shipped_model_is_as_fast_as_with_one_thread():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(ALLOWED - 1)]
    try:
        done = python("-c", RATIO)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    threads, ratio = done.stdout.split()
    assert int(threads) == 1
    assert float(ratio) > 0.7


def version_2(group, quota, folder=""):
    return {"proc/self/cgroup": f"0::{group}\n", f"sys/fs/cgroup{folder}/cpu.max": f"{quota}\n"}


def version_1(group, quota):
    folder = f"sys/fs/cgroup/cpu{group}".rstrip("/")
    files = {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    return files | {"proc/self/cgroup": f"3:cpu,cpuacct:{group}\n2:memory:/a\n"}


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, ALLOWED),
        (version_2("/", "100000 100000"), 1),
        (version_2("/", "50000 100000"), 1),
        (version_2("/a/b", "100000 100000", folder="/a"), 1),
        (version_2("/of/the/host", "100000 100000"), 1),
        *((version_2("/", quota), ALLOWED) for quota in ("max 100000", "900000000 100000", "nonsense")),
        (version_1("/a", 100000), 1),
        (version_1("/", -1), ALLOWED),
    ],
)
def test_quotas_bound_the_count(tmp_path, files, count):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.cores(tmp_path) == count
