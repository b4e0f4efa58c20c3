"""infer bench: what it measures, and that its table says what was measured."""

import json

import numpy as np
import pytest
from tiny_models import CHARS, random_weights, run_config, write_model

from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer import bench
from infer.cli import run
from infer.engine import Engine


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_TURN_S", 0.01)
    return write_model(tmp_path / "m.onnx", precision="int8")


def test_every_figure_is_there_in_order_and_in_the_table(path, capsys):
    assert run(["bench", "-m", str(path), "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["sampling"]["top_k"]) == ("int8", 40)
    assert report["streams"].keys() == {"1", "8", "64"}
    for figure in [*report["streams"].values(), *report["start"].values()]:
        assert 0 < figure["q1"] <= figure["median"] <= figure["q3"]
    start = {name: figure["median"] for name, figure in report["start"].items()}
    assert start["whole"] >= max(start["imports"], start["load"], start["first"])
    shown = bench.table(report | {"streams": {int(n): figures for n, figures in report["streams"].items()}})
    assert f"{report['streams']['64']['median']:,.0f}" in shown
    assert [word for word in ("imports", "1 stream", "8 streams", "64 streams") if word not in shown] == []


def test_characters_a_second_are_those_drawn(path, monkeypatch):
    engine, clock, drawn = Engine(path), iter(np.arange(0, 1000, 0.001)), []

    def fake(prompt, length, options, seeds, *, in_graph):
        while True:
            drawn.append(len(seeds) * 4)
            yield np.zeros((len(seeds), 4), np.int64)

    monkeypatch.setattr(engine, "drawn", fake)
    monkeypatch.setattr(bench, "perf_counter", lambda: float(next(clock)))
    per_s = bench.chars_per_s(engine, 8, SamplingOptions())
    # A reading of the clock a run and one that ends it: 32 characters take 1 ms.
    assert per_s == pytest.approx(sum(drawn[6:]) / (0.001 * (len(drawn) - 6 + 1)))


def test_start_up_ignores_the_current_folder_and_document_ends(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    vocab = Vocab.of_chars(CHARS.symbols, document_end="\n")
    weights = random_weights(run_config(), len(vocab))
    weights["head.bias"][vocab.document_end_id] = 1000  # ends at once
    assert bench.start_up(str(write_model(tmp_path / "m.onnx", vocab, weights=weights)))["first"] > 0
