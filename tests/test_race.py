"""The race's transformer is the published one, learns, and the table says what happened."""

import math

import numpy as np
import pytest
import torch
from training import tiny_config

from benchmarks.gpu.contest import Clock, Limits, Ours, Reference, race, warm_up, windows_loss
from benchmarks.gpu.reference_transformer import Recipe, Shape, Transformer, TransformerTraining
from charrnn.data.corpus import prepare
from train.loop.dataloader import IdSource

CPU = torch.device("cpu")
TINY = Shape(layers=2, heads=2, width=16, context=12)
SHORT = Recipe(batch_size=8, steps=6, warmup_steps=2)


def test_the_full_size_is_the_published_one():
    model = Transformer(Shape(), 65)
    parameters = sum(p.numel() for p in model.parameters())
    assert 10.60e6 < parameters - model.positions.weight.numel() < 10.70e6  # nanoGPT's README: 10.65M
    assert 10.60e6 < parameters < 10.80e6


def test_a_later_character_changes_no_earlier_logits():
    torch.manual_seed(0)
    model = Transformer(TINY, 7).eval()
    ids = torch.randint(0, 7, (3, 12))
    changed = ids.clone()
    changed[:, 8] = (ids[:, 8] + 1) % 7
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_the_transformer_learns():
    ids = IdSource((np.arange(300) % 5).astype(np.uint8), CPU)
    training = TransformerTraining(TINY, Recipe(batch_size=8, lr=1e-2, warmup_steps=5, steps=60), 5, ids, bf16=False)
    losses = [training.step().item() for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(5), abs=0.2)
    assert losses[-1] < losses[0] / 2


def test_the_learning_rate_warms_up_and_ends_at_its_last():
    ids = IdSource(np.zeros(50, np.uint8), CPU)
    training = TransformerTraining(TINY, Recipe(), 5, ids, bf16=False)
    rates = []
    for training.step_number in (0, 99, 100, 2550, 5000):
        rates.append(training.lr())
    assert rates == pytest.approx([1e-3 / 101, 1e-3 * 100 / 101, 1e-3, 5.5e-4, 1e-4])


def test_evaluation_predicts_every_character_once_undropped(tmp_path):
    corpus = prepare(tiny_config(tmp_path).data)
    side, val = Reference(TINY, SHORT, corpus, CPU), IdSource(corpus.val, CPU)
    losses = {windows_loss(side, val, TINY.context) for _ in range(2)}
    assert len(losses) == 1
    assert side.model.training
    ids = torch.from_numpy(np.asarray(corpus.val).astype(np.int64))
    side.model.eval()
    one_by_one = [
        torch.nn.functional.cross_entropy(side.model(x[None])[0], y, reduction="sum").item()
        for x, y in zip(ids[:-1].split(TINY.context), ids[1:].split(TINY.context), strict=True)
    ]
    assert losses.pop() == pytest.approx(sum(one_by_one) / (len(ids) - 1), rel=1e-5)


def test_a_target_out_of_reach_is_reported_as_not_reached(tmp_path):
    config = tiny_config(tmp_path)
    corpus = prepare(config.data)
    for make in (lambda clock: Ours(config, clock), lambda _: Reference(TINY, SHORT, corpus, CPU)):
        result = race(make, IdSource(corpus.val, CPU), TINY.context, Limits(0.001, 60, 60, steps=3))
        assert (result.reached_s, result.steps, len(result.curve)) == (None, 3, 1)
        assert result.chars_per_s > 0


def test_a_side_ends_at_its_target_and_its_clock_stops(tmp_path):
    corpus = prepare(tiny_config(tmp_path).data)
    val = IdSource(corpus.val, CPU)
    result = race(lambda _: Reference(TINY, SHORT, corpus, CPU), val, TINY.context, Limits(100.0, 60, 1e-9))
    assert (result.steps, len(result.curve)) == (1, 1)
    assert result.reached_s == result.seconds == result.curve[0][0]
    clock = Clock(CPU)
    clock.start()
    clock.stop()
    assert clock() == clock()


def test_a_side_ends_with_its_schedule(tmp_path):
    corpus = prepare(tiny_config(tmp_path).data)
    val = IdSource(corpus.val, CPU)
    result = race(lambda _: Reference(TINY, SHORT, corpus, CPU), val, TINY.context, Limits(0.001, 60, 60))
    assert (result.steps, result.reached_s) == (SHORT.steps, None)


def test_every_side_is_warmed_up_before_any_clock_starts(tmp_path):
    corpus, events = prepare(tiny_config(tmp_path).data), []

    class Noted(Reference):
        def __init__(self, clock):
            super().__init__(TINY, SHORT, corpus, CPU)
            self.clock = clock

        def train_step(self):
            events.append(self.clock())
            return super().train_step()

    warm_up([Noted, Noted], CPU)
    assert events == [0.0] * 4
