"""The learning-rate schedule and the optimizer's groups."""

import pytest

from charrnn.config import ModelConfig, OptimConfig, RunConfig, load_config
from charrnn.errors import ConfigError
from charrnn.model.rnn import CharRNN
from train.loop.optimizer import lr_at, lr_factor, make_optimizer
from train.loop.schedule import Schedule


def optim(**fields):
    return OptimConfig(lr=0.1, warmup_steps=10, final_lr=0.2, **fields)


def test_warm_up_rises_linearly_to_lr():
    assert [lr_at(s, optim(), 0.0) for s in range(10)] == pytest.approx([0.01 * (s + 1) for s in range(10)])


@pytest.mark.parametrize(
    ("schedule", "quarter", "halfway", "end"),
    [("constant", 0.1, 0.1, 0.1), ("linear", 0.08, 0.06, 0.02), ("cosine", 0.02 + 0.04 * (1 + 0.5**0.5), 0.06, 0.02)],
)
def test_decay_follows_its_closed_form(schedule, quarter, halfway, end):
    config = optim(schedule=schedule)
    assert lr_at(10, config, 0.0) == pytest.approx(0.1)
    assert lr_at(30, config, 0.25) == pytest.approx(quarter)
    assert lr_at(50, config, 0.5) == pytest.approx(halfway)
    assert lr_at(99, config, 1.0) == pytest.approx(end)
    assert lr_at(99, config, 1.5) == pytest.approx(end)


def test_only_matrices_decay():
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=4), 5)
    groups = make_optimizer(model, optim(weight_decay=0.3)).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() > 1}
    assert spared == {id(p) for p in model.parameters() if p.dim() == 1}


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"), [("none", 256, 1), ("sqrt", 256, 2), ("linear", 256, 4), ("sqrt", 16, 0.5)]
)
def test_the_rate_grows_with_the_batch_by_its_rule(scaling, batch, factor):
    train = {} if scaling == "none" else {"lr_scaling": scaling, "lr_batch_size": 64}
    config = RunConfig.model_validate({"data": {"batch_size": batch}, "train": train})
    assert lr_factor(config) == pytest.approx(factor)


@pytest.mark.parametrize("train", [{"lr_scaling": "sqrt"}, {"lr_batch_size": 64}])
def test_a_rule_needs_the_batch_that_the_rate_is_meant_for(train):
    with pytest.raises(ConfigError, match="go together"):
        load_config(None, {f"train.{key}": value for key, value in train.items()})


def test_a_scaled_run_warms_up_over_the_same_steps_and_so_more_characters():
    """LEGW: k times the batch, sqrt(k) times the rate, k times the warm-up in epochs."""
    rates = {}
    for batch in (4, 16):
        fields = {"data.batch_size": batch, "train.lr_scaling": "sqrt", "train.lr_batch_size": 4}
        schedule = Schedule(load_config(None, {"optim.warmup_steps": 5, **fields}), 1)
        rates[batch] = []
        for schedule.progress.step in range(12):
            rates[batch].append(schedule.next_lr())
    assert rates[16] == pytest.approx([2 * rate for rate in rates[4]])
    assert max(rates[16]) == rates[16][4] == pytest.approx(2 * OptimConfig().lr)
