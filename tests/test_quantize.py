"""Rounded weights: how far they lie from the exact ones, what the file takes, and what an export of one checks."""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import CHARS, model_bytes, write_model

from charrnn.errors import CorpusError, ExportError, ModelFileError
from infer.engine import Engine
from train.export import exporter as export
from train.export.quantize import quantize_columns, quantize_embedding
from train.given_text import GivenText

matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 5)), elements=st.floats(-9, 9, width=32))


@given(matrix=matrices)
def test_by_columns_a_value_lies_within_half_a_step_too(matrix):
    steps, scales, _ = quantize_columns(matrix)
    limit = np.abs(matrix).max(axis=0) / 127 / 2
    assert (np.abs(steps * scales - matrix) <= limit * 1.001 + 1e-9).all()


@given(matrix=matrices, size=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]))
def test_a_bias_survives_its_column_however_small_that_is(matrix, size):
    bias = np.linspace(-size, size, matrix.shape[1], dtype=np.float32)
    _, scales, scaled = quantize_columns(matrix, bias)
    assert np.isfinite(scaled).all()
    assert (scales > 0).all()
    np.testing.assert_allclose(scaled * scales, bias, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_an_int8_file_is_under_a_third_of_the_float_one(rnn):
    sizes = {p: len(model_bytes(rnn=rnn, precision=p, hidden_dim=256, embedding_dim=64)) for p in ("fp32", "int8")}
    assert sizes["int8"] < sizes["fp32"] / 3


@given(matrix=matrices)
def test_embedding_is_within_half_a_step(matrix):
    steps, scaled = quantize_embedding(matrix, np.eye(matrix.shape[1], dtype=np.float32))
    found = (steps.astype(np.float32) - 128) / 127 @ scaled
    assert (np.abs(found - matrix) <= np.abs(matrix).max(axis=0) / 127 / 2 * 1.001 + 1e-9).all()


def test_a_float_file_gives_back_its_weights_bit_for_bit(tmp_path):
    path = write_model(tmp_path / "m.onnx")
    out, difference, _ = export.export(path, tmp_path / "again.onnx", "fp32", None)
    assert difference == 0
    assert [t.SerializeToString() for t in onnx.load(out).graph.initializer] == [
        t.SerializeToString() for t in onnx.load(path).graph.initializer
    ]


def test_a_rounded_file_is_not_rounded_again(tmp_path):
    path = write_model(tmp_path / "m.onnx", precision="int8")
    with pytest.raises(ExportError, match="is int8: its weights are rounded"):
        export.export(path, None, "int8", None)


def test_weights_in_a_wrong_place_fail_the_export_of_a_rounded_file(tmp_path, monkeypatch):
    path, build = write_model(tmp_path / "m.onnx"), export.build_onnx

    def scrambled(config, vocab, matrices, metadata, precision):
        return build(config, vocab, matrices | {"recurrent0": matrices["recurrent0"][::-1]}, metadata, precision)

    monkeypatch.setattr(export, "build_onnx", scrambled)
    with pytest.raises(ExportError, match="was not written"):
        export.export(path, tmp_path / "out.onnx", "int8", None)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_loss_on_the_validation_split_goes_into_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the prepared text lands in its data/
    text = tmp_path / "text.txt"
    text.write_text("".join(CHARS.symbols) + "ROME am i there! " * 500)
    path = write_model(tmp_path / "m.onnx")
    out, _, line = export.export(path, None, "int8", GivenText(str(text)))
    engine = Engine(out)
    assert engine.metrics["fp32/val/stream/loss"] == 1.5  # what the exact file says of itself
    assert engine.metrics["val/stream/loss"] > 0
    assert f"stream {engine.metrics['val/stream/loss']:.4f}" in line
    assert engine.metrics["val/windows/bpc"] == pytest.approx(engine.metrics["val/windows/loss"] / np.log(2))
    assert json.loads(engine.metadata["charrnn.metrics"]) == engine.metrics


def test_without_the_text_a_rounded_file_claims_no_loss(tmp_path):
    out, _, line = export.export(write_model(tmp_path / "m.onnx"), None, "int8", None)
    assert "not measured: give --data TEXT" in line
    assert not [name for name in Engine(out).metrics if name.startswith("val/")]


def test_another_text_than_the_models_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "other.txt"
    text.write_text("0123456789 " * 900)
    with pytest.raises(CorpusError, match="other characters"):
        export.export(write_model(tmp_path / "m.onnx"), None, "int8", GivenText(str(text)))


def test_a_model_file_that_is_absent_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="no model file"):
        export.export(tmp_path / "absent.onnx", None, "int8", None)


def test_a_file_that_records_no_metrics_is_rounded_too(tmp_path):
    path = write_model(tmp_path / "m.onnx", changed={"metrics": None})
    out, _, _ = export.export(path, None, "int8", None)
    assert Engine(out).metrics == {}
