"""The recipe: valid, trainable fields for any text, machine and budget, under whatever the user sets."""

import math
from pathlib import Path

import pytest
from cudnn_kernels import training_calls
from hypothesis import given
from hypothesis import strategies as st

from charrnn.config import ModelConfig, load_config
from charrnn.windows import split_bounds
from train.loop.dataloader import window_plan
from train.loop.flops import flops_per_char
from train.loop.schedule import Schedule
from train.recipe.rules import MOST_DEFAULT_S, Facts, Recipe, choose

CONFIGS = Path(__file__).parent.parent / "configs"
BASE = ModelConfig(rnn="LSTM", num_layers=2, hidden_dim=512, embedding_dim=128, layer_norm=True)

FACTS = st.builds(
    Facts,
    characters=st.integers(300, 10**10),
    symbols=st.integers(2, 20_000),
    flops=st.floats(1e9, 1e16),
    budget_s=st.one_of(st.just(0.0), st.floats(30, 1e6)),
    epochs=st.one_of(st.just(0.0), st.floats(0.1, 100)),
    origin=st.sampled_from([None, BASE]),
    origin_loss=st.floats(0.5, 12),
    ngram_loss=st.one_of(st.none(), st.floats(0.05, 12)),
    on_gpu=st.booleans(),
    share=st.integers(1, 8),
)


def config_of(recipe: Recipe):
    return load_config(None, recipe.fields)


def plan_of(facts: Facts, config):
    start, stop = split_bounds(facts.characters, config.data.split)["train"]
    return window_plan(config, stop - start)


@given(FACTS)
def test_the_fields_are_valid_and_the_rows_fit_the_text(facts):
    config = config_of(choose(facts))
    if facts.characters > 100 * facts.share:
        assert plan_of(facts, config).steps_per_epoch >= 1
    assert config.data.batch_size % facts.share == 0
    assert config.data.split[1] * facts.characters <= max(0.1 * facts.characters, 140_000)


@given(FACTS)
def test_a_run_has_at_least_ten_evaluations_and_ends_by_a_limit(facts):
    config = config_of(choose(facts))
    assert config.train.time_limit or config.train.epochs
    times = 0
    limited = {"time_limit": 0.0, "epochs": 0.0, "max_steps": 200}
    schedule = Schedule(config.model_copy(update={"train": config.train.model_copy(update=limited)}), 1)
    for step in range(1, 201):
        schedule.progress.step = step
        if schedule.evaluation_due():
            schedule.evaluated(1.0)
            times += 1
    assert times >= 10


@given(FACTS)
def test_evaluations_read_at_most_a_twentieth(facts):
    config = config_of(choose(facts))
    model = facts.origin or config.model
    speed = facts.flops / flops_per_char(model, facts.symbols)
    length = facts.characters * config.data.split[0]
    chars = config.train.epochs * length
    if config.train.time_limit:
        chars = min(chars, config.train.time_limit * speed)
    if config.eval.sample > 1024:
        warm_up, at_the_end = 2048, 2 * 4
        read = (config.eval.times + at_the_end) * (config.eval.sample + warm_up)
        assert read / (1 if facts.on_gpu else 6) <= 0.0501 * chars


@given(FACTS, st.floats(1.1, 100))
def test_more_time_never_means_a_smaller_network(facts, times):
    budget_s = facts.budget_s or 60.0
    small, large = (choose(_with(facts, budget_s=b, origin=None)) for b in (budget_s, budget_s * times))
    for name in ("model.hidden_dim", "model.num_layers"):
        assert large.fields[name] >= small.fields[name]


@given(FACTS, st.floats(1.1, 100))
def test_more_passes_never_mean_less_dropout(facts, times):
    budget_s = facts.budget_s or 60.0
    fixed = _with(facts, origin=BASE, epochs=0.0)
    few, many = (choose(_with(fixed, budget_s=b)) for b in (budget_s, budget_s * times))
    assert many.fields["model.dropout"] >= few.fields["model.dropout"]


@given(FACTS, st.floats(0.1, 1))
def test_the_more_a_text_tells_of_itself_the_faster_the_given_weights_change(facts, less):
    fixed = _with(facts, origin=BASE, init_from="base", ngram_loss=facts.ngram_loss or 1.5)
    lr, faster = (choose(_with(fixed, ngram_loss=fixed.ngram_loss * by)).fields["optim.lr"] for by in (1, less))
    unknown = choose(_with(fixed, ngram_loss=None)).fields["optim.lr"]
    assert unknown <= lr <= faster <= min(0.006, 4.22 * unknown)  # rates have two digits
    if fixed.ngram_loss >= fixed.origin_loss:
        assert lr == unknown


def test_less_than_a_pass_is_of_all_the_text():
    part, passes = (choose(Facts(10**7, 90, 4e11, budget_s=seconds)).fields for seconds in (30, 10**5))
    assert 0 < part["data.segment"] < 10**7 // part["data.batch_size"] // 10
    assert passes["data.segment"] == 0


def test_what_a_text_tells_of_itself_is_learnt_faster_in_few_steps():
    novel = Facts(100_000, 90, 4e11, budget_s=5, origin=BASE, init_from="base", origin_loss=2.0, ngram_loss=1.2)
    similar = _with(novel, ngram_loss=2.0)
    hurried, unhurried, known, known_unhurried = (
        choose(_with(facts, budget_s=seconds)).fields["optim.lr"] for facts in (novel, similar) for seconds in (5, 500)
    )
    assert hurried == 2 * unhurried
    assert known == known_unhurried < unhurried


def test_beyond_the_bases_scale_a_larger_model_is_trained():
    facts = Facts(10**9, 100, 1e14, budget_s=3600, origin=BASE, init_from="base", on_gpu=True)
    recipe = choose(facts)
    assert recipe.fields["train.init_from"] == "none"
    assert recipe.fields["model.hidden_dim"] > BASE.hidden_dim
    for less in (_with(facts, characters=10**6), _with(facts, flops=4e11), _with(facts, init_from="runs/mine")):
        assert choose(less).fields["train.init_from"] == less.init_from


@given(FACTS)
def test_user_limits_are_kept_and_the_default_is_bounded(facts):
    fields = choose(facts).fields
    if facts.budget_s:
        assert fields["train.time_limit"] == facts.budget_s
    elif facts.epochs:
        assert fields["train.time_limit"] == 0
    else:
        assert 0 < fields["train.time_limit"] <= math.ceil(MOST_DEFAULT_S)
    if facts.epochs:
        assert fields["train.epochs"] == facts.epochs


@pytest.mark.parametrize(("origin", "part"), [(BASE, "this text's words and layout"), (None, "more text helps most")])
def test_a_small_text_is_told_what_to_expect(origin, part):
    assert part in choose(Facts(5000, 60, 4e11, origin=origin)).expectation
    assert not choose(Facts(500_000, 60, 4e11, origin=origin)).expectation


def test_on_a_gpu_shakespeare_gets_the_quick_recipe():
    fields = choose(Facts(1_115_394, 65, 1e13, budget_s=10, on_gpu=True)).fields
    quick = load_config(CONFIGS / "gpu-quick.yaml", {})
    chosen = load_config(None, fields)
    assert chosen.model.model_copy(update={"dropout": 0.0, "dropout_mask": "character"}) == quick.model
    assert (chosen.data.batch_size, chosen.data.seq_len, chosen.data.windows) == (64, 64, "carry")
    assert chosen.optim.lr == quick.optim.lr


def test_on_a_gpu_rows_grow_with_the_text():
    chosen = [choose(Facts(n, 65, 1e13, origin=BASE, on_gpu=True)).fields for n in (20_000, 200_000, 10**6, 10**9)]
    assert [fields["data.batch_size"] for fields in chosen] == [16, 32, 64, 128]


@given(FACTS)
def test_on_a_gpu_every_layer_has_a_persistent_kernel(facts):
    config = config_of(choose(_with(facts, on_gpu=True)))
    if facts.characters < 10_000 * facts.share:  # too few rows
        return
    for call in training_calls(config, processes=facts.share):
        assert call.has_resident_kernel()


def test_on_a_cpu_smaller_embeddings_are_cheaper():
    calls = training_calls(config_of(choose(Facts(1_000_000, 65, 4e11))))
    assert not all(call.has_resident_kernel() for call in calls)


def _with(facts: Facts, **changes):
    return Facts(**{**vars(facts), **changes})
