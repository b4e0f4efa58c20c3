"""benchmarks/scaling: its arithmetic against hand-made numbers and a simulated ring, and the program as it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.common import cli
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import estimates
from benchmarks.scaling.workers import workers
from charrnn.config import ModelConfig

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "scaling" / "__main__.py"


def simulated_ring(size, processes):
    """Sums vectors of `size` bytes around a ring, chunk by chunk; returns the bytes each process sent, and the stages.

    Process p sends chunk (p - stage), which it has just added to or been given, to process p + 1.
    """
    chunk = size // processes // 8
    vectors = np.random.default_rng(0).normal(size=(processes, processes, chunk))  # (process, chunk, element)
    total = vectors.sum(0)
    held, sent, stages = vectors.copy(), np.zeros(processes), 0
    for phase in ("add", "give"):
        for stage in range(processes - 1):
            shift = stage if phase == "add" else stage - 1
            moving = [(p, (p - shift) % processes) for p in range(processes)]
            parcels = [held[p, c].copy() for p, c in moving]
            for (p, c), parcel in zip(moving, parcels, strict=True):
                target = (p + 1) % processes
                held[target, c] = held[target, c] + parcel if phase == "add" else parcel
                sent[p] += parcel.nbytes
            stages += 1
    assert all(np.allclose(mine, total) for mine in held)
    return sent, stages


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_the_ring_formula_counts_what_a_simulated_ring_sends(processes):
    size = processes * 8 * 5
    sent, stages = simulated_ring(size, processes)
    assert sent == pytest.approx(estimates.ring_bytes(size, processes))
    only_latency = estimates.Network(bandwidth=float("inf"), latency=1.0)
    assert estimates.ring_seconds(size, processes, only_latency) == stages


def test_ring_time_is_traffic_over_bandwidth_plus_latency():
    network = estimates.Network(bandwidth=1e6, latency=0.001)
    assert estimates.ring_seconds(8_000_000, 2, network) == pytest.approx(8 + 2 * 0.001)
    assert estimates.ring_seconds(8_000_000, 4, network) == pytest.approx(12 + 6 * 0.001)
    assert estimates.ring_seconds(8_000_000, 1, network) == 0


# With 2 processes and 1 byte a second, an all-reduce takes as many seconds as it has bytes.
SLOW = estimates.Network(bandwidth=1.0, latency=0.0)


def test_projection_adds_the_network_to_a_step():
    row = estimates.projection(10.0, [5, 3], 2, SLOW)
    assert row == pytest.approx({"processes": 2, "allreduce_s": 8.0, "efficiency": 10 / 18})


def test_case_metrics_are_means_over_processes_and_steps():
    first = [{"step": 1.0, "input": 0.1}, {"step": 2.0, "input": 0.1}]
    second = [{"step": 3.0, "input": 0.3}, {"step": 1.0, "input": 0.3}]
    found = estimates.case_metrics("apart", [first, second])
    assert found == pytest.approx({"apart.step": 1.75, "apart.input": 0.2})


ROUND = {"one.step": 1.0, "apart.step": 1.1, "silent.step": 1.2, "together.step": 1.25}


def test_the_parts_of_a_step_add_up_and_the_ratios_multiply():
    made = estimates.derived(ROUND)
    assert made["efficiency"] == pytest.approx(0.8)
    assert made["hardware"] * made["communication"] == pytest.approx(made["efficiency"])
    assert made["hardware"] == pytest.approx(1 / 1.1)
    assert ROUND["silent.step"] + made["exposed"] == pytest.approx(ROUND["together.step"])


def test_summary_takes_quartiles_of_what_each_round_says():
    rounds = [{**ROUND, "together.step": 1.25 * factor} for factor in (1, 2, 4, 5, 10)]
    quartiles = estimates.summary(rounds)["efficiency"]
    assert (quartiles.q1, quartiles.median, quartiles.q3) == pytest.approx((0.16, 0.2, 0.4))


class FakeWorkers:
    def __init__(self):
        self.cases = []

    def turn(self, case, steps):
        self.cases.append(case)
        return [[{"step": 1.0, "input": 0.1}] * steps] * 2


def test_every_case_comes_in_every_place_of_a_round():
    started = FakeWorkers()
    measured = scaling.measure(started, 1, 5)
    rounds = [started.cases[i : i + 5] for i in range(5, 30, 5)]  # after one turn of each
    for place in zip(*rounds, strict=True):
        assert sorted(place) == sorted(estimates.CASES)
    assert len(measured) == 5


def test_one_process_is_not_compared_with_itself():
    result = CliRunner().invoke(cli(scaling.scaling), ["--processes", "1"])
    assert result.exit_code == 2
    assert "processes" in result.output


@pytest.mark.slow
def test_a_worker_that_ends_early_ends_the_program(tmp_path):
    options = {"data.source": str(tmp_path / "absent.txt"), "data.batch_size": 2}
    with pytest.raises(RuntimeError, match="a worker ended before it was ready"), workers(options, 2):
        pass


@pytest.mark.slow
def test_the_program_measures_every_case_consistently():
    size = ["--rnn", "GRU", "--hidden-dim", "24", "--num-layers", "1", "--seq-len", "8", "--rows", "4"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *size, "--steps", "2", "--rounds", "3", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "settings", "metrics", "message", "projection", "rounds"}
    check_rounds(report)
    check_message(report)
    check_projection(report)
    check_table(report)


def check_rounds(report):
    assert len(report["rounds"]) == report["settings"]["rounds"] == 3
    for taken in report["rounds"]:
        for case in ("one", "apart", "silent", "together", "allreduce"):
            assert 0 < taken[f"{case}.step"] < 10
        assert all(0 < taken[f"{case}.input"] < 10 for case in ("one", "apart", "silent", "together"))
    for name, quartiles in report["metrics"].items():
        assert quartiles["q1"] <= quartiles["median"] <= quartiles["q3"], name
    efficiency = sorted(r["one.step"] / r["together.step"] for r in report["rounds"])
    assert report["metrics"]["efficiency"]["median"] == pytest.approx(efficiency[1])


def check_message(report):
    from charrnn.model.rnn import CharRNN

    message, measured = report["message"], report["metrics"]
    model = CharRNN(ModelConfig(rnn="GRU", hidden_dim=24, num_layers=1), 95)  # the printable ASCII characters
    assert message["bytes"] == 4 * model.num_parameters() == sum(message["bucket_bytes"])
    assert message["ring_bytes"] == message["bytes"]  # of 2 processes
    assert message["gbit_s"] == pytest.approx(message["bytes"] * 8e-9 / measured["allreduce.step"]["median"])


def check_projection(report):
    rows = report["projection"]
    assert [row["processes"] for row in rows] == [2, 4, 8, 16, 64]
    assert report["settings"]["bandwidth"] == 10
    size, buckets = report["message"]["bytes"], len(report["message"]["bucket_bytes"])
    for row in rows:
        n = row["processes"]
        by_hand = 2 * (n - 1) / n * size / 1.25e9 + buckets * 2 * (n - 1) * 50e-6
        assert row["allreduce_s"] == pytest.approx(by_hand)
        step_s = report["metrics"]["one.step"]["median"]
        assert row["efficiency"] == pytest.approx(step_s / (step_s + by_hand))


def check_table(report):
    text = scaling.table(report)
    assert f"efficiency     {report['metrics']['efficiency']['median']:.3f}" in text
    assert f"{report['message']['bytes']:,} bytes of gradients" in text
    assert max(map(len, text.splitlines())) <= 120
