"""benchmarks/scaling: its arithmetic against hand-made numbers, and the program as it runs."""

import re
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from launches import python
from typer.testing import CliRunner

from benchmarks import scaling
from benchmarks.common import cli
from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN


@pytest.mark.parametrize(("processes", "stages", "sent"), [(1, 0, 0), (2, 2, 8e6), (4, 6, 12e6), (8, 14, 14e6)])
def test_a_ring_sends_the_message_nearly_twice_in_2_n_minus_2_stages(processes, stages, sent):
    assert scaling.ring_seconds(8e6, processes, 1e6, 0) == pytest.approx(sent / 1e6)
    assert scaling.ring_seconds(8e6, processes, float("inf"), 0.001) == pytest.approx(stages * 0.001)


def test_the_table_has_medians_of_ratios_within_rounds_and_the_projection():
    taken = {
        "one": [1.0, 1.0, 2.0],
        "apart": [1.1, 1.25, 2.5],
        "together": [1.25, 2.0, 3.2],
        "allreduce": [0.1] * 3,
        "input": [0.01] * 3,
    }
    lines = scaling.table(taken, [3_000_000, 1_000_000], 2, bandwidth=0.032, latency_us=0)
    text = "\n".join(lines)
    assert re.search(r"^1 process, ms a step +1000.00 \(1000.00 to 1500.00\)$", text, re.M)
    assert re.search(r"^efficiency +0.625 ", text, re.M)
    assert re.search(r"^hardware +0.800 ", text, re.M)
    assert re.search(r"^communication +0.781 ", text, re.M)
    assert "4,000,000 bytes of gradients a step, in 2 bucket(s)" in text
    assert "0.3 Gbit/s each way" in text
    # At 4 MB/s the message takes a second, as long as a step.
    assert lines[-5].split() == ["2", "1000.00", "0.500"]


def test_every_case_comes_in_every_place_of_a_round(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    trainer = SimpleNamespace(model=CharRNN(ModelConfig(hidden_dim=8), 5))
    rank, cases = scaling.Rank(trainer), []
    monkeypatch.setattr(rank, "turn", lambda case, steps: cases.append(case) or 1.0)
    monkeypatch.setattr(rank, "input_seconds", lambda: 0.1)
    taken = rank.measure(1, 4)
    for place in zip(*(cases[i : i + 4] for i in range(4, 20, 4)), strict=True):  # after one turn of each
        assert sorted(place) == sorted(scaling.CASES)
    assert {len(seconds) for seconds in taken.values()} == {4}


def test_one_process_is_not_compared_with_itself():
    result = CliRunner().invoke(cli(scaling.scaling), ["--processes", "1"])
    assert result.exit_code == 2
    assert "processes" in result.output


@pytest.mark.slow
def test_the_program_measures_every_case():
    size = ["--rnn", "GRU", "--hidden-dim", "24", "--num-layers", "1", "--seq-len", "8", "--rows", "4"]
    done = python("-m", "benchmarks.scaling", *size, "--steps", "2", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    model = CharRNN(ModelConfig(rnn="GRU", hidden_dim=24, num_layers=1), 95)  # the printable ASCII characters
    assert f"{4 * model.num_parameters():,} bytes of gradients a step, in 1 bucket(s)" in done.stdout
    for name in ("1 process, ms", "2 processes, no exchange", "2 processes ", "input", "bare all-reduce", "efficiency"):
        q1, median, q3 = map(
            float, re.search(rf"^{name}.*? ([\d.]+) \(([\d.]+) to ([\d.]+)\)", done.stdout, re.M).group(2, 1, 3)
        )
        assert 0 < q1 <= median <= q3 < 10_000
    assert re.findall(r"^(\d+) +[\d.]+ +0\.\d+$", done.stdout, re.M) == ["2", "4", "8", "16", "64"]
    assert max(map(len, done.stdout.splitlines())) <= 120
