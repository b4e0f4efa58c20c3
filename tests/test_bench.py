"""infer bench: what it measures, and that its table says what was measured."""

import json

import numpy as np
import pytest
from tiny_models import write_model

from charrnn.sampling import SamplingOptions
from infer import bench
from infer.cli import run
from infer.engine import Engine


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_TURN_S", 0.01)
    return Engine(write_model(tmp_path / "m.onnx"))


@pytest.fixture
def report(engine):
    return bench.bench(engine, 2, SamplingOptions(0.8, 5))


def test_every_figure_is_there_and_in_order(report):
    assert report["streams"].keys() == {1, 8, 64}
    figures = [*report["streams"].values(), report["stepped"], report["bare_step"]]
    figures += [*report["start"].values(), *report["bandwidth"].values()]
    for figure in figures:
        assert 0 < figure["q1"] <= figure["median"] <= figure["q3"]
    start = {name: figure["median"] for name, figure in report["start"].items()}
    assert start["whole"] >= max(start["imports"], start["load"], start["first"])


def test_characters_a_second_are_those_drawn(engine, monkeypatch):
    clock, drawn = iter(np.arange(0, 1000, 0.001)), []

    def fake(prompt, length, options, seeds, *, in_graph):
        while True:
            drawn.append(len(seeds) * 4)
            yield np.zeros((len(seeds), 4), np.int64)

    monkeypatch.setattr(engine, "drawn", fake)
    monkeypatch.setattr(bench, "perf_counter", lambda: float(next(clock)))
    per_s = bench.chars_per_s(engine, 8, SamplingOptions())
    # A reading of the clock a run and one that ends it: 32 characters take 1 ms.
    assert per_s == pytest.approx(sum(drawn[6:]) / (0.001 * (len(drawn) - 6 + 1)))


def test_weight_bytes_are_those_of_the_file_but_its_table(tmp_path):
    for precision in ("fp32", "int8"):
        engine = Engine(write_model(tmp_path / "m.onnx", precision=precision, hidden_dim=128, num_layers=2))
        table = len(engine.vocab) * 3 * 128 * (4 if precision == "fp32" else 2)
        rest = engine.path.stat().st_size - table
        assert bench.weight_bytes(engine) == pytest.approx(rest, rel=0.25)  # biases and the graph itself are left out
        assert bench.weight_bytes(engine) < rest


def test_the_table_shows_the_report(report):
    shown = bench.table(report)
    assert f"{report['streams'][64]['median']:,.0f}" in shown
    assert f"{report['weight_bytes_per_char']:,} bytes a character" in shown
    for word in ("imports", "1 stream", "8 streams", "64 streams", "network alone", "GB/s from 256 MiB"):
        assert word in shown


def test_json_is_one_object(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_TURN_S", 0.01)
    path = write_model(tmp_path / "m.onnx", precision="int8")
    assert run(["bench", "-m", str(path), "--rounds", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["precision"], told["sampling"]["top_k"]) == ("int8", 40)
    assert told["streams"]["1"]["median"] > 0
