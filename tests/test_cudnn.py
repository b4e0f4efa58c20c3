"""The GPU recipes qualify for cuDNN's persistent kernel, by torch's rules."""

from dataclasses import replace
from pathlib import Path

import pytest
from cudnn_kernels import Call, training_calls

from charrnn.config import load_config
from charrnn.model.rnn import CharRNN

CONFIGS = Path(__file__).parent.parent / "configs"
QUICK = Call("LSTM", 128, 512, 1, 64)


@pytest.mark.parametrize(("change", "resident"), [
    ({}, True),
    ({"hidden_size": 1024, "rows": 128}, True),
    ({"hidden_size": 128, "rnn": "GRU", "num_layers": 2}, True),
    ({"num_layers": 2}, False),
    ({"input_size": 64}, False),
    ({"hidden_size": 576}, False),
    ({"hidden_size": 1152}, False),
    ({"rows": 60}, False),
    ({"rows": 136}, False),
    ({"rnn": "GRU"}, False),
])  # fmt: skip
def test_the_persistent_kernel_is_chosen_by_torchs_rules(change, resident):
    assert replace(QUICK, **change).has_resident_kernel() is resident


@pytest.mark.parametrize(("name", "assignments", "resident"), [
    ("gpu-quick.yaml", [], True),
    ("shakespeare.yaml", [], True),
    ("gpu-quick.yaml", ["model.embedding_dim=64"], False),
    ("gpu-quick.yaml", ["data.batch_size=36"], False),
    ("gpu-quick.yaml", ["model.rnn=GRU"], False),
])  # fmt: skip
def test_the_gpu_recipes_qualify(name, assignments, resident):
    config = load_config(CONFIGS / name, {}, assignments)
    calls = training_calls(config)
    assert len(calls) == config.model.num_layers
    assert all(call.has_resident_kernel() for call in calls) is resident


@pytest.mark.parametrize("assignments", [
    [], ["model.layer_norm=true"], ["model.dropout=0.2"], ["model.num_layers=1"], ["model.num_layers=3"],
])  # fmt: skip
def test_the_calls_are_those_that_the_model_makes(assignments):
    config = load_config(None, {"model.hidden_dim": 16, "model.embedding_dim": 8}, assignments)
    model = CharRNN(config.model, 5)
    assert (len(training_calls(config)) > 1 or config.model.num_layers == 1) == (
        model.runs_layer_by_layer("cuda", training=True) or config.model.num_layers == 1
    )


def test_rows_are_those_of_a_micro_batch():
    config = load_config(CONFIGS / "plain.yaml", {"train.accumulation_steps": 4, "data.batch_size": 128})
    (call,) = training_calls(config, processes=2)
    assert (call.rows, call.num_layers, call.input_size) == (16, 2, 256)
