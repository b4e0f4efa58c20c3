"""Every speed benchmark runs at a tiny size, and prints machine, versions and its table."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import columns, in_turns, markdown_head, quartiles, ratios
from benchmarks.speed.reference_loop import Network, SlidingWindows, losses
from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN

ROOT = Path(__file__).parent.parent
TINY = {
    "train_speed": "--rnn GRU --hidden-dim 16 --batch-size 4 --seq-len 8 --rounds 2 --steps 1",
    "generate": "--hidden-dim 16 --rounds 2 --seconds 0.05",
    "prepare": "--gigabytes 0.001 --kind mixed",
    "checkpoint_stall": "--hidden-dim 16 --rows 4 --seq-len 8 --rounds 2 --steps 2",
}
ROWS = {  # what begins the rows of the tables
    "train_speed": ("reference ", "fp32 ", "native "),
    "generate": ("torch eager", "onnxruntime GRU op", "stepped", "loop, fp32 ", "loop, int8 ", "loop, int8, 64"),
    "prepare": ("| mixed |",),
    "checkpoint_stall": ("step ", "snapshot ", "stall ", "waited "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_run_prints_machine_and_table(tmp_path, name):
    command = [sys.executable, "-m", f"benchmarks.speed.{name}", *TINY[name].split()]
    # libgomp's threads otherwise spin at barriers, and a busy machine slows down a hundredfold.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"machine  .+, \d+ cores; torch \S+, accelerate \S+, onnxruntime \S+; \d{4}(-\d\d){2}T.*", first
    )
    for start in ROWS[name]:
        (line,) = [line for line in lines if line.startswith(start)]
        assert re.search(r"\d", line.removeprefix(start))


def test_quartiles_interpolate_and_ratios_pair_rounds():
    assert quartiles([1, 2, 3, 4, 5]).show(".1f") == "3.0 (2.0 to 4.0)"
    assert quartiles([2.0]).show(".0f", 1e3) == "2000 (2000 to 2000)"
    assert ratios([2, 6, 20], [1, 2, 4]).show(".1f") == "3.0 (2.5 to 4.0)"


def test_sides_take_turns_and_the_warmup_is_dropped():
    calls = []

    def side(name):
        return lambda: calls.append(name) or len(calls)

    taken = in_turns({"a": side("a"), "b": side("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert taken == {"a": [3, 5], "b": [4, 6]}


def test_tables_align_text_left_and_numbers_right():
    assert columns(["a", 1, "2"], (3, 4, 2)) == "a     1 2"
    assert markdown_head(["a", "b", "c"], numbers=2) == ["| a | b | c |", "|---|--:|--:|"]


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_the_reference_computes_the_models_logits(rnn):
    config = ModelConfig(rnn=rnn, embedding_dim=6, hidden_dim=9)
    model, reference = CharRNN(config, 11), Network(config, 11)
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(0, 11, (3, 5))
    torch.testing.assert_close(reference(ids), model(ids, model.zero_state(3))[0])


def test_targets_are_inputs_shifted_by_one_character():
    windows = SlidingWindows(torch.arange(10), 4)
    assert len(windows) == 6
    assert [part.tolist() for part in windows[5]] == [[5, 6, 7, 8], [6, 7, 8, 9]]


def test_the_reference_learns():
    torch.manual_seed(0)
    text = torch.arange(200) % 5
    config = ModelConfig(embedding_dim=8, hidden_dim=16, num_layers=1)
    curve = list(itertools.islice(losses(config, text, 5, 16, 8), 60))
    assert curve[-1] < curve[0] / 2
