"""The learning-rate schedule and the optimizer's groups."""

import math

import pytest

from charrnn.config import ModelConfig, OptimConfig
from charrnn.model.rnn import CharRNN
from train.optimizer import lr_at, make_optimizer


def optim(**fields):
    return OptimConfig(lr=0.1, warmup_steps=10, final_lr=0.2, **fields)


def test_warm_up_rises_linearly_to_lr():
    assert [lr_at(s, optim(), 0.0) for s in range(10)] == pytest.approx([0.01 * (s + 1) for s in range(10)])


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("constant", 0.1, 0.1), ("linear", 0.06, 0.02), ("cosine", 0.06, 0.02)]
)
def test_decay_follows_its_closed_form(schedule, halfway, end):
    config = optim(schedule=schedule)
    assert lr_at(10, config, 0.0) == pytest.approx(0.1)
    assert lr_at(50, config, 0.5) == pytest.approx(halfway)
    assert lr_at(99, config, 1.0) == pytest.approx(end)
    assert lr_at(99, config, 1.5) == pytest.approx(end)


def test_cosine_is_steepest_in_the_middle():
    quarter = lr_at(50, optim(schedule="cosine"), 0.25)
    assert quarter == pytest.approx(0.1 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_only_matrices_decay():
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=4), 5)
    groups = make_optimizer(model, optim(weight_decay=0.3)).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() > 1}
    assert spared == {id(p) for p in model.parameters() if p.dim() == 1}
