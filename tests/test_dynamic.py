"""Dynamic evaluation: it predicts before it learns, never looks ahead, and is reported apart."""

import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.common import cli
from benchmarks.quality import dynamic
from benchmarks.quality.dynamic import DynamicOptions, dynamic_loss
from charrnn.model.rnn import CharRNN
from train.checkpoint.format import load_for_inference
from train.loop.dataloader import IdSource

CPU = torch.device("cpu")


def fresh_model(trained):
    best = load_for_inference(trained.checkpoints.run_dir)
    model = CharRNN(best.config.model, len(best.vocab))
    model.load_state_dict(best.weights)
    return model


def losses_of(trained, ids, **options):
    train = IdSource(trained.data.corpus.train, CPU)
    return dynamic_loss(fresh_model(trained), IdSource(ids, CPU), train, DynamicOptions(**options))


def test_without_moves_it_is_the_plain_stream(trained):
    figures = losses_of(trained, trained.data.corpus.val, lr=0.0, segment=7)
    val = torch.from_numpy(trained.data.corpus.val.astype("int64"))[None]
    model = fresh_model(trained).eval()
    with torch.no_grad():
        logits, _ = model(val[:, :-1], model.zero_state(1))
    expected = torch.nn.functional.cross_entropy(logits[0].double(), val[0, 1:]).item()
    assert figures["dynamic/stream/loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["dynamic/stream/bpc"] == pytest.approx(expected / math.log(2), rel=1e-5)


def test_learning_from_a_text_that_repeats_itself_helps_unless_weights_are_pulled_back(trained):
    repeated = np.tile(trained.data.corpus.val[:40], 20)
    static, free, pulled = (
        losses_of(trained, repeated, **options)["dynamic/stream/loss"]
        for options in ({"lr": 0.0}, {"lr": 1e-3, "decay": 0.0}, {"lr": 1e-3, "decay": 1e6})
    )
    assert free < static - 0.05
    assert abs(pulled - static) < 0.2 * (static - free)


def test_a_segment_is_predicted_before_it_is_learnt_from(trained):
    segment = 16
    ids = trained.data.corpus.val[: segment + 1]  # one segment: nothing has been learnt when it is predicted
    still = losses_of(trained, ids, lr=0.0, segment=segment)
    assert losses_of(trained, ids, lr=1.0, segment=segment) == still


def test_the_command_prints_what_it_measures(trained):
    ran = CliRunner().invoke(cli(dynamic.command), [str(trained.checkpoints.run_dir), "--lr", "0"])
    expected = losses_of(trained, trained.data.corpus.val, lr=0.0)["dynamic/stream/loss"]
    assert ran.exit_code == 0
    assert f"dynamic/stream   {expected:.4f} nats/char" in ran.stdout
