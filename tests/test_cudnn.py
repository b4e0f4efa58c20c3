"""cuDNN's kernel for a recurrent call, by torch's rules; the GPU recipes qualify for the persistent one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from charrnn.config import load_config
from charrnn.model.rnn import CharRNN
from train.cudnn import Algorithm, Call, Gpu, algorithm, training_calls

CONFIGS = Path(__file__).parent.parent / "configs"
H100, A100, A10, T4, V100 = Gpu((9, 0), 132), Gpu((8, 0), 108), Gpu((8, 6), 72), Gpu((7, 5), 40), Gpu((7, 0), 80)
QUICK = Call("LSTM", 128, 512, 1, 64, 64, torch.float16)


@pytest.mark.parametrize(("change", "gpu", "persistent"), [
    ({}, H100, True),
    ({}, A100, True),
    ({"hidden_size": 1024, "rows": 128}, H100, True),
    ({"rows": 8, "seq_len": 1}, H100, True),
    ({"dtype": torch.bfloat16}, H100, False),
    ({"dtype": torch.float32}, H100, False),
    ({"num_layers": 2}, H100, False),
    ({"input_size": 64}, H100, False),
    ({"hidden_size": 576}, H100, False),
    ({"hidden_size": 1152}, H100, False),
    ({"rows": 60}, H100, False),
    ({"rows": 136}, H100, False),
    ({"rnn": "GRU"}, H100, False),
    ({}, Gpu((8, 9), 142), True),
    ({}, Gpu((8, 0), 56), False),
    ({}, Gpu((8, 6), 104), False),
    ({}, A10, False),
    ({}, T4, False),
    ({}, V100, True),
    ({"rnn": "GRU"}, V100, True),
    ({"rows": 80}, V100, False),
    ({"rows": 72}, V100, False),
    ({"rows": 128, "seq_len": 20}, V100, False),
    ({"rows": 96, "seq_len": 20}, V100, True),
    ({"rows": 32, "seq_len": 10}, V100, True),
    ({"rows": 48, "seq_len": 10}, V100, False),
])  # fmt: skip
def test_the_persistent_kernel_is_chosen_by_torchs_rules(change, gpu, persistent):
    for backward in (False, True):
        chosen = algorithm(replace(QUICK, **change), gpu, backward=backward)
        assert chosen == (Algorithm.PERSIST_STATIC if persistent else Algorithm.STANDARD)


@pytest.mark.parametrize(("width", "forward", "backward"), [(128, True, True), (192, True, False), (224, False, False)])
def test_small_widths_have_a_kernel_of_their_own(width, forward, backward):
    call = replace(QUICK, hidden_size=width, rnn="GRU", num_layers=2, dtype=torch.float32)
    assert (algorithm(call, H100) is Algorithm.PERSIST_SMALL_H) is forward
    assert (algorithm(call, H100, backward=True) is Algorithm.PERSIST_SMALL_H) is backward
    assert algorithm(replace(call, dtype=torch.float64), H100) is Algorithm.STANDARD
    assert algorithm(call, Gpu((5, 2), 24)) is Algorithm.STANDARD


@pytest.mark.parametrize("name", ["gpu-quick.yaml", "shakespeare.yaml"])
def test_the_gpu_recipes_qualify(name):
    config = load_config(CONFIGS / name, {})
    for dtype, expected in ((torch.float16, Algorithm.PERSIST_STATIC), (torch.bfloat16, Algorithm.STANDARD)):
        calls = training_calls(config, dtype)
        assert len(calls) == config.model.num_layers
        assert {algorithm(call, H100, backward=b) for call in calls for b in (False, True)} == {expected}


@pytest.mark.parametrize("assignment", ["model.embedding_dim=64", "data.batch_size=36", "model.rnn=GRU"])
def test_a_recipe_off_the_rules_does_not_qualify(assignment):
    calls = training_calls(load_config(CONFIGS / "gpu-quick.yaml", {}, [assignment]), torch.float16)
    assert Algorithm.STANDARD in {algorithm(call, H100) for call in calls}


@pytest.mark.parametrize("assignments", [
    [], ["model.layer_norm=true"], ["model.dropout=0.2"], ["model.num_layers=1"], ["model.num_layers=3"],
])  # fmt: skip
def test_the_calls_are_those_that_the_model_makes(assignments):
    config = load_config(None, {"model.hidden_dim": 16, "model.embedding_dim": 8}, assignments)
    model = CharRNN(config.model, 5)
    assert (len(training_calls(config, torch.float16)) > 1 or config.model.num_layers == 1) == (
        model.runs_layer_by_layer("cuda", training=True) or config.model.num_layers == 1
    )


def test_rows_are_those_of_a_micro_batch():
    config = load_config(CONFIGS / "plain.yaml", {"train.accumulation_steps": 4, "data.batch_size": 128})
    (call,) = training_calls(config, torch.float16, processes=2)
    assert (call.rows, call.num_layers, call.input_size) == (16, 2, 256)
