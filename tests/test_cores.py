"""CPU cores: those allowed by control groups, those free, and the number of threads that an engine takes by it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from charrnn import cores
from infer import Engine, engine
from infer.engine import default_threads
from infer.model_file.loader import default_model

ROOT = Path(__file__).parent.parent


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


needs_ticks = pytest.mark.skipif(not hasattr(os, "sysconf"), reason="os.sysconf is Unix's")


@needs_ticks
@pytest.mark.parametrize(
    ("own", "idle", "waiting", "free"),
    [(0.5, 0.5, 0, 2), (0.25, 0.5, 0.25, 2), (0.5, 0, 0, 1), (0.25, 0, 0, 0.5), (0.5, 3.5, 0, 8)],
)
def test_cores_are_free_that_idle_wait_for_disks_or_work_for_this_process(later, own, idle, waiting, free):
    later(0.5, own, stat(300 + idle, 200 + waiting))
    assert cores.free_cores() == pytest.approx(free)


@needs_ticks
@pytest.mark.parametrize("now", [None, "", "cpu 1 2\n", "cpu a b c d e f\n", stat(0)])
def test_where_the_system_does_not_count_nothing_is_known_of_its_cores(later, now):
    later(0.5, 0.5, now)
    assert cores.free_cores() == math.inf


@needs_ticks
def test_a_moment_is_too_short_to_know(later):
    later(0.03, 0.03, stat(500))
    assert cores.free_cores() == math.inf


def test_the_count_begins_before_what_is_slow_to_import():
    code = "import sys, infer; assert 'charrnn.cores' in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("allowed", "free", "threads"),
    [(2, 1.0, 1), (2, 0.3, 1), (2, 1.4, 1), (2, 1.8, 2), (2, math.inf, 2), (8, 3.1, 3), (8, 7.9, 4), (1, 8, 1)],
)
def test_a_large_model_takes_the_cores_that_are_free(monkeypatch, allowed, free, threads):
    monkeypatch.setattr(engine, "cores", lambda: allowed)
    monkeypatch.setattr(engine, "free_cores", lambda: free)
    assert default_threads(default_model(), 1) == threads


def test_a_small_model_takes_one_thread_on_an_idle_machine_too(monkeypatch, gru):
    monkeypatch.setattr(engine, "free_cores", lambda: 64.0)
    assert default_threads(gru.path, 1) == 1


def test_threads_that_were_asked_for_are_taken_on_a_busy_machine_too(monkeypatch, gru):
    monkeypatch.setattr(engine, "free_cores", lambda: 0.0)
    assert Engine(gru.path, threads=2).threads == 2


ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
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
        run = [sys.executable, "-c", RATIO]
        done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    threads, ratio = done.stdout.split()
    assert int(threads) == 1
    assert float(ratio) > 0.7


ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def written(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, ALLOWED),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, ALLOWED),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/of/the/host\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            ALLOWED,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "900000000 100000\n"}, ALLOWED),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, ALLOWED),
    ],
)
def test_quotas_bound_the_count(tmp_path, files, count):
    assert cores.cores(written(tmp_path, files)) == count
