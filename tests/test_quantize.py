"""Rounded weights: how far they lie from the exact ones, what the file takes, and what an export of one checks."""

import json

import numpy as np
import onnx
import pytest
from format_1 import format_1
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import CHARS, model_bytes, write_model

from charrnn.errors import CorpusError, ExportError, ModelFileError
from infer.engine import Engine
from train.export import exporter as export
from train.export.quantize import BLOCK, by_column, pack_columns
from train.texts import GivenText

matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 5)), elements=st.floats(-9, 9, width=32))


def unpacked(packed, inner):
    """(K, N) back from the layout, by its description in onnxruntime's ContribOperators.md."""
    stored = packed.blocks
    if packed.bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
    scales = packed.scales.reshape(*stored.shape[:2], 1)
    values = (stored.astype(np.float32) - 2 ** (packed.bits - 1)) * scales
    return values.reshape(len(values), -1)[:, :inner].T


@pytest.mark.parametrize("precision", ["int8", "int4"])
@given(matrix=matrices)
def test_a_value_lies_within_half_a_step_of_the_exact_one(precision, matrix):
    packed = pack_columns(matrix, precision)
    steps = {"int8": 127, "int4": 7}[precision]
    for start in range(0, len(matrix), BLOCK):
        exact, found = matrix[start : start + BLOCK], unpacked(packed, len(matrix))[start : start + BLOCK]
        limit = np.abs(exact).max(axis=0) / steps / 2
        assert (np.abs(found - exact) <= limit * 1.001 + 1e-9).all()


@given(matrix=matrices)
def test_by_columns_a_value_lies_within_half_a_step_too(matrix):
    found = by_column(matrix)
    limit = np.abs(matrix).max(axis=0) / 127 / 2
    assert (np.abs(found.steps * found.scales - matrix) <= limit * 1.001 + 1e-9).all()


@given(matrix=matrices, size=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]))
def test_a_bias_survives_its_column_however_small_that_is(matrix, size):
    bias = np.linspace(-size, size, matrix.shape[1], dtype=np.float32)
    found = by_column(matrix, bias)
    assert np.isfinite(found.bias).all()
    assert (found.scales > 0).all()
    np.testing.assert_allclose(found.bias * found.scales, bias, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_an_int8_file_is_under_a_third_of_the_float_one(rnn):
    sizes = {p: len(model_bytes(rnn=rnn, precision=p, hidden_dim=256, embedding_dim=64)) for p in ("fp32", "int8")}
    assert sizes["int8"] < sizes["fp32"] / 3


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_file_of_version_1_is_written_anew(tmp_path, rnn, precision):
    old = tmp_path / "old.onnx"
    old.write_bytes(format_1(rnn=rnn))
    out, _, line = export.export(old, None, precision, None)
    assert out == tmp_path / f"old-{precision}.onnx"
    assert precision in line
    engine, before = Engine(out), Engine(old)
    assert (engine.draws, before.draws) == (True, False)
    assert engine.metadata["charrnn.precision"] == precision
    ids = CHARS.encode("ROMEO: am i")[None]
    logits = (engine.step(ids, engine.zero_state(1))[0], before.step(ids, before.zero_state(1))[0])
    np.testing.assert_allclose(*logits, atol={"fp32": 1e-4, "int8": 0.5, "int4": 6}[precision])


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_version_1_and_version_2_write_the_same_text(tmp_path, rnn):
    old = tmp_path / "old.onnx"
    old.write_bytes(format_1(rnn=rnn))
    new = Engine(write_model(tmp_path / "new.onnx", rnn=rnn))
    texts = ["".join(e.generate("ROMEO:", 300, temperature=0.8, top_k=9, seed=4)) for e in (Engine(old), new)]
    assert texts[0] == texts[1]


def test_a_float_file_gives_back_its_weights_bit_for_bit(tmp_path):
    path = write_model(tmp_path / "m.onnx")
    out, difference, _ = export.export(path, tmp_path / "again.onnx", "fp32", None)
    assert difference == 0
    assert [t.SerializeToString() for t in onnx.load(out).graph.initializer] == [
        t.SerializeToString() for t in onnx.load(path).graph.initializer
    ]


def test_a_rounded_file_is_not_rounded_again(tmp_path):
    path = write_model(tmp_path / "m.onnx", precision="int8")
    with pytest.raises(ExportError, match="is int8: its weights cannot be had back"):
        export.export(path, None, "int4", None)


def test_weights_in_a_wrong_place_fail_the_export_of_a_rounded_file(tmp_path, monkeypatch):
    path, build = write_model(tmp_path / "m.onnx"), export.build_of_matrices

    def scrambled(config, vocab, matrices, metadata, precision):
        return build(config, vocab, matrices | {"recurrent0": matrices["recurrent0"][::-1]}, metadata, precision)

    monkeypatch.setattr(export, "build_of_matrices", scrambled)
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
