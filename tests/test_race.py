"""The race's transformer is the published one, learns, and the table says what happened."""

import math

import numpy as np
import pytest
import torch
from training import tiny_config

from benchmarks.gpu.contest import Clock, Limits, Ours, Reference, race, windows_loss
from benchmarks.gpu.transformer import Recipe, Shape, Transformer
from charrnn.data.corpus import prepare
from train.loop.dataloader import IdSource

CPU = torch.device("cpu")
TINY = Shape(layers=2, heads=2, width=16, context=12)
SHORT = Recipe(batch_size=8, steps=6, warmup_steps=2)


@pytest.fixture
def corpus(tmp_path):
    return prepare(tiny_config(tmp_path).data)


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


@pytest.mark.parametrize("compiled", [False, True])
def test_the_transformer_learns(corpus, compiled):
    recipe = Recipe(batch_size=8, peak_lr=1e-2, warmup_steps=5, steps=60)
    side, val = Reference(TINY, recipe, corpus, CPU, compiled=compiled), IdSource(corpus.val, CPU)
    before = windows_loss(side, val, TINY.context)
    assert before == pytest.approx(math.log(len(corpus.vocab)), abs=0.2)
    assert [side.train_step() for _ in range(61)] == [True] * 60 + [False]
    assert windows_loss(side, val, TINY.context) < 0.8 * before
    assert (side.compile_s is not None) == compiled


def test_compiling_changes_nothing_but_the_speed(corpus):
    eager, compiled = (Reference(TINY, SHORT, corpus, CPU, compiled=compiled) for compiled in (False, True))
    for side in (eager, compiled):
        torch.manual_seed(1)
        side.train_step()
    for ours, theirs in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_learning_rate_warms_up_and_ends_at_its_last():
    rates = [Recipe().lr(step) for step in (0, 99, 100, 2550, 5000)]
    assert rates == pytest.approx([1e-3 / 101, 1e-3 * 100 / 101, 1e-3, 5.5e-4, 1e-4])


def test_evaluation_predicts_every_character_once_undropped(corpus):
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


def test_a_side_ends_at_its_target_its_limit_or_with_its_schedule(tmp_path, corpus):
    config, val = tiny_config(tmp_path), IdSource(corpus.val, CPU)

    def ended(make, *limits):
        result = race(make, val, TINY.context, Limits(*limits))
        assert result["chars_per_s"] > 0
        return result

    def reference(_):
        return Reference(TINY, SHORT, corpus, CPU)

    for make in (lambda clock: Ours(config, clock), reference):
        result = ended(make, 0.001, 60, 60, 3)
        assert (result["reached_s"], result["steps"], len(result["curve"])) == (None, 3, 1)
    result = ended(reference, 0.001, 60, 60)
    assert (result["steps"], result["reached_s"]) == (SHORT.steps, None)
    result = ended(reference, 100.0, 60, 1e-9)
    assert (result["steps"], len(result["curve"])) == (1, 1)
    assert result["reached_s"] == result["seconds"] == result["best_s"]


def test_a_clock_that_is_stopped_stands_still():
    clock = Clock(CPU)
    assert clock() == 0
    clock.start()
    clock.stop()
    assert clock() == clock() > 0
