"""infer.model_file.loader: which files are opened, and what is said of the others."""

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_models import model_bytes, write_model

import infer.model_file.loader
from charrnn.errors import ModelFileError
from infer import Engine


def test_without_a_path_the_first_shipped_model_is_used(tmp_path, monkeypatch):
    places = (tmp_path / "absent.onnx", write_model(tmp_path / "m.onnx"), write_model(tmp_path / "later.onnx"))
    monkeypatch.setattr(infer.model_file.loader, "DEFAULT_MODELS", places)
    assert Engine().path == places[1]
    monkeypatch.setattr(infer.model_file.loader, "DEFAULT_MODELS", places[:1])
    with pytest.raises(ModelFileError, match="no default model"):
        Engine()


def refused(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        Engine(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_what_is_no_model_file_is_refused_with_a_remedy(tmp_path):
    assert "train one with" in refused(tmp_path / "absent.onnx")
    assert "train.export" in refused(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    assert str(tmp_path / "model.onnx") in refused(tmp_path)
    assert "damaged" in refused(tmp_path / "model.onnx")
    (tmp_path / "text.onnx").write_text("To be, or not to be\n" * 100)
    assert "another kind of file" in refused(tmp_path / "text.onnx")
    assert "cannot read" in refused(tmp_path / ("x" * 300))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", value[:1], value[1:])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    assert "not charrnn's" in refused(tmp_path / "other.onnx")
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refused(tmp_path / "pipe")


def text_of(path: Path) -> str:
    return "".join(Engine(path).generate("ROMEO:", 20, seed=1))


@given(st.floats(0, 1, exclude_max=True), st.booleans())
@settings(max_examples=100)
def test_a_file_cut_short_is_refused_or_lacks_nothing_that_matters(tmp_path_factory, fraction, in_metadata):
    """A cut between two pieces of metadata leaves a whole ONNX file; the last ones only tell where it came from."""
    folder, whole = tmp_path_factory.getbasetemp(), model_bytes()
    (folder / "whole.onnx").write_bytes(whole)
    start = whole.rindex(b"charrnn.format_version") if in_metadata else 0
    (folder / "short.onnx").write_bytes(whole[: start + int(fraction * (len(whole) - start))])
    try:
        text = text_of(folder / "short.onnx")
    except ModelFileError:
        return
    assert text == text_of(folder / "whole.onnx")


def test_a_file_whose_graph_is_cut_short_is_refused(tmp_path):
    whole = model_bytes()
    for fraction in (0.01, 0.3, 0.6, 0.9):
        (tmp_path / "short.onnx").write_bytes(whole[: int(fraction * whole.rindex(b"charrnn.format_version"))])
        assert "cut short" in refused(tmp_path / "short.onnx")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"format_version": None}, "not charrnn's"),
        ({"format_version": "2"}, "format version '2'.*reads version 1; upgrade"),
        ({"format_version": "one"}, "format version 'one'"),
        ({"vocab": None}, "lacks charrnn.vocab;"),
        ({"vocab": None, "config": None}, "lacks charrnn.vocab, charrnn.config;"),
        ({"vocab": "{"}, "charrnn.vocab is not a vocabulary"),
        (
            {"vocab": '{"kind": "chars", "symbols": ["a", "b"]}'},
            r"not that of the GRU of its metadata \(2 x 24, 2 symbols\)",
        ),
        ({"config": "not json"}, "charrnn.config is not JSON"),
        ({"config": "[1]"}, "must be a JSON object, not list"),
        ({"config": "{}"}, "no model section"),
        ({"config": '{"model": {"rnn": "RNN"}}'}, "rnn 'RNN'"),
        ({"config": '{"model": {"rnn": ["GRU"]}}'}, "rnn"),
        ({"config": '{"model": {"rnn": "GRU", "num_layers": true, "hidden_dim": 24}}'}, "num_layers True"),
        (
            {"config": '{"model": {"rnn": "GRU", "num_layers": 3, "hidden_dim": 24}}'},
            r"not that of .*\(3 x 24, 34 symbols\)",
        ),
        (
            {"config": '{"model": {"rnn": "GRU", "num_layers": 2, "hidden_dim": 9}}'},
            r"not that of .*\(2 x 9, 34 symbols\)",
        ),
        ({"config": '{"model": {"rnn": "LSTM", "num_layers": 2, "hidden_dim": 24}}'}, "not that of the LSTM of"),
        ({"metrics": "{"}, "charrnn.metrics is not JSON"),
        ({"metrics": "[" * 100_000}, "charrnn.metrics is not JSON"),
        ({"corpus": "7"}, "charrnn.corpus must be a JSON object"),
    ],
)
def test_metadata_that_is_missing_malformed_or_untrue_is_refused(tmp_path, changed, named):
    path = write_model(tmp_path / "m.onnx", changed=changed)
    assert re.search(named, refused(path))


def test_a_file_without_metrics_and_corpus_still_runs(tmp_path):
    changed = dict.fromkeys(("metrics", "corpus", "corpus_sha256"))
    engine = Engine(write_model(tmp_path / "bare.onnx", changed=changed))
    assert (engine.metrics, engine.corpus) == ({}, {})
    assert len("".join(engine.generate("ROMEO:", 5))) == 5


def test_a_model_that_onnxruntime_warns_of_loads_without_a_word(tmp_path, capfd):
    model = onnx.load_from_string(model_bytes())
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 / 127, np.float32), "state_scale"))
    onnx.save(model, tmp_path / "warned.onnx")
    Engine(tmp_path / "warned.onnx")
    assert capfd.readouterr().err == ""
