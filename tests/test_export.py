"""Export: onnxruntime agrees with torch, or there is no file."""

import itertools
import json

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.common import cli
from charrnn.config import ModelConfig, RunConfig
from charrnn.errors import CheckpointError, ExportError
from charrnn.model.rnn import CharRNN
from charrnn.vocab import Vocab
from infer.engine import Engine
from train.checkpoint.format import load_for_inference
from train.export import exporter as export
from train.export.__main__ import command
from train.export.exporter import ExactModel, metadata_of, write_checked
from train.export.parity import step_of
from train.export.weights import fold

VOCAB = Vocab.of_chars("abcdefg\n")
METADATA = {
    "charrnn.format_version": "1",
    "charrnn.precision": "fp32",
    "charrnn.vocab": VOCAB.to_json(),
    "charrnn.metrics": "{}",
    "charrnn.corpus": json.dumps({"name": "x", "source": "x", "num_chars": 1}),
    "charrnn.corpus_sha256": "0" * 64,
}


def model_of(rnn="GRU", num_layers=2, dropout=0.0, layer_norm=False):
    torch.manual_seed(3)
    shape = {"rnn": rnn, "embedding_dim": 5, "hidden_dim": 12, "num_layers": num_layers}
    model = CharRNN(ModelConfig(**shape, dropout=dropout, layer_norm=layer_norm), len(VOCAB))
    for norm in model.norms:  # as training leaves it: neither ones nor zeros
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    return model


def metadata_for(model):
    return METADATA | {"charrnn.config": RunConfig(model=model.config).model_dump_json()}


def exact_model(model, change=lambda weights: weights):
    """A model for the exporter, with changed weights in the graph alone."""
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    folded = fold(model.config, change(weights))
    return ExactModel(step_of(model), model.config, VOCAB, folded, metadata_for(model))


@pytest.mark.parametrize(("rnn", "num_layers"), list(itertools.product(("GRU", "LSTM"), (1, 2, 3))))
@pytest.mark.parametrize("layer_norm", [False, True])
def test_parity_over_cell_layers_batch_and_length(tmp_path, rnn, num_layers, layer_norm):
    model = model_of(rnn, num_layers, dropout=0.4, layer_norm=layer_norm)
    difference = write_checked(exact_model(model), tmp_path / "m.onnx")
    assert difference < 1e-5
    engine = Engine(tmp_path / "m.onnx")
    for batch, length in itertools.product((1, 3), (1, 7)):
        ids = torch.randint(len(VOCAB), (batch, length))
        state = tuple(torch.randn_like(part) for part in model.zero_state(batch))
        with torch.no_grad():
            logits, after = model.eval()(ids, state)
        theirs, theirs_after = engine.step(ids.numpy(), tuple(part.numpy() for part in state))
        assert theirs.shape == (batch, length, len(VOCAB))
        np.testing.assert_allclose(theirs, logits.numpy(), atol=1e-5)
        for ours, other in zip(after, theirs_after, strict=True):
            np.testing.assert_allclose(other, ours.numpy(), atol=1e-5)


def test_the_file_is_self_contained(tmp_path):
    model = model_of("LSTM")
    write_checked(exact_model(model), tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert not {i.name for i in proto.graph.input} & {t.name for t in proto.graph.initializer}  # onnxruntime warns
    assert not any(t.external_data for t in proto.graph.initializer)
    assert {p.key for p in proto.metadata_props} == set(metadata_for(model))


def scrambled_gates(weights):
    return {k: (v[::-1].copy() if "weight_hh" in k else v) for k, v in weights.items()}


def not_a_number(weights):
    return weights | {"head.bias": np.full(len(VOCAB), np.nan, np.float32)}


@pytest.mark.parametrize("change", [scrambled_gates, not_a_number])
def test_a_mismatch_fails_the_export_and_leaves_no_file(tmp_path, change):
    with pytest.raises(ExportError, match="differ from torch's by"):
        write_checked(exact_model(model_of(), change), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    write_checked(exact_model(model_of()), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(ExportError):
        write_checked(exact_model(model_of(), change), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == before  # the file that was there


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    model = model_of()
    with pytest.raises(ExportError, match="choose another --out"):
        write_checked(exact_model(model), tmp_path / "file" / "m.onnx")


def test_metadata_tells_vocabulary_config_metrics_and_corpus(trained):
    run_dir = trained.checkpoints.run_dir
    best = load_for_inference(run_dir)
    told = metadata_of(best)
    assert Vocab.from_json(told["charrnn.vocab"]) == best.vocab
    config = json.loads(told["charrnn.config"])
    assert config["model"] == best.config.model.model_dump()
    assert config["data"]["split"] == list(best.config.data.split)
    assert (config["data"]["source"], json.loads(told["charrnn.corpus"])["source"]) == ("words.txt", "words.txt")
    assert str(run_dir.parent) not in json.dumps(told)
    metrics = json.loads(told["charrnn.metrics"])
    assert metrics["val/stream/loss"] > 0
    assert metrics["val/windows/bpc"] == pytest.approx(metrics["val/windows/loss"] / np.log(2))
    assert {"step", "chars", "time_s", "parameters", "hardware"} <= metrics.keys()
    assert len(told["charrnn.corpus_sha256"]) == 64


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("shakespeare", "shakespeare"), ("/home/me/a novel.txt", "a novel.txt"), ("C:\\texts\\", "texts"),
        ("https://host/b.txt?key=secret", "b.txt"), ("-", "-"), ("notes/*.md", "*.md"),
    ],
)  # fmt: skip
def test_a_file_tells_its_texts_name_and_not_where_it_lay(source, told):
    assert export.without_folders(source) == told


def test_the_command_exports_a_run_and_refuses_what_is_none(trained, tmp_path):
    out = tmp_path / "sub" / "m.onnx"
    done = CliRunner().invoke(cli(command), [str(trained.checkpoints.run_dir), "--out", str(out)])
    assert "largest difference from torch" in done.stdout
    assert Engine(out).vocab.unknown_in("the") == []
    with pytest.raises(CheckpointError, match="no run or checkpoint folder"):
        command(tmp_path / "absent")
