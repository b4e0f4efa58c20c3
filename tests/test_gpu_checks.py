"""The checks for a GPU machine: what they record, and, slowly, all of them at a tiny size on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.race import goal
from benchmarks.gpu.report import failures, tables
from benchmarks.gpu.results import END, Results, read_all
from benchmarks.gpu.speed import busy_us

ROOT = Path(__file__).parent.parent


def raising():
    raise RuntimeError("CUDA error:\nan illegal memory access")


def test_each_result_is_on_disk_at_once_whatever_it_is(tmp_path, capsys):
    path = tmp_path / "correct.json"
    results = Results(path, 60)
    seen = []
    for name, check in {
        "measured": lambda: {"chars/s": float("inf")},
        "wrong": lambda: {"ok": False, "largest": float("nan")},
        "broken": raising,
        "right": lambda: {"ok": True},
    }.items():
        results.check(name, check)
        seen.append(list(json.loads(path.read_text())))
    assert seen[-1] == ["measured", "wrong", "broken", "right"]
    assert [len(names) for names in seen] == [1, 2, 3, 4]
    assert "Infinity" not in path.read_text()
    assert "NaN" not in path.read_text()
    assert failures(read_all(tmp_path)) == ["correct.wrong", "correct.broken"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FAIL", "FAIL", "ok"]
    assert "an illegal memory access" in lines[2]


def test_no_check_starts_after_the_time_limit_but_the_phase_ends(tmp_path):
    results = Results(tmp_path / "race.json", -1)
    assert results.check("late", raising) == {"skipped": "no time left"}
    results.check(END, dict)
    assert failures(read_all(tmp_path)) == []
    assert END in read_all(tmp_path)["race"]


def test_tables_hold_what_was_found():
    side = {
        "reached_s": 1.25,
        "chars_per_s": 1e6,
        "memory": 2**21,
        "seconds": 2,
        "steps": 9,
        "best": 1.4,
        "compile_s": 3,
    }
    phases = {
        "correct": {"environment": {"GPU": "NVIDIA H100", "torch": "2.13", "seconds": 0.1}, END: {"seconds": 0}},
        "race": {"quick": side, "slow": side | {"reached_s": None, "compile_s": None}, "goal": {"skipped": "x"}},
        "speed": {"cells": {"forward, both": {"float16": [1.5, 4.5]}}},
    }
    text = "\n".join(tables(phases))
    for part in ("GPU NVIDIA H100", "| environment | ok | 0.1 |", "| 1.25 | 9 | 1.4000 | 3.0 |", "not in 2", "| 4.5 |"):
        assert part in text
    assert END not in text
    assert tables({}) == []


@pytest.mark.parametrize(("quick", "others", "ok"), [
    ([1.0, 2.0], [9.0, 6.0], True),
    ([1.0, 2.1], [9.0, 6.0], False),
    ([3.5], [30.0], False),
    ([1.0, None], [9.0], None),
    ([1.0], [None], None),
])  # fmt: skip
def test_the_goal_counts_the_slowest_seed_against_the_faster_transformer(quick, others, ok):
    values = {f"gpu-quick.yaml, replayed, seed {i}": {"reached_s": s} for i, s in enumerate(quick)}
    values |= {f"transformer, {i}": {"reached_s": s} for i, s in enumerate(others)}
    values["gpu-quick.yaml, eager, seed 1"] = {"reached_s": 99.0}
    assert goal(values).get("ok") is ok


def test_overlapping_kernels_are_busy_once():
    assert busy_us([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7
    assert busy_us([]) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_checks_pass_on_a_cpu(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=870)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read_all(tmp_path / "out")
    assert all(END in found[phase] for phase in ("correct", "commands", "race", "speed"))
    skipped = {f"{phase}.{name}" for phase, checks in found.items() for name, v in checks.items() if "skipped" in v}
    assert skipped == {"correct.out_of_memory", "race.goal"}  # the one needs a GPU, the other a target that is reached
    assert "| gpu-quick.yaml, replayed, seed 1 |" in (tmp_path / "out" / "tables.md").read_text()
