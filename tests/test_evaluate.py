"""Evaluation: both protocols against the plain definition, and the same figures from the exported file."""

import json
import math

import numpy as np
import pytest
import torch
from training import fresh_accelerator, make_trainer, tiny_config
from typer.testing import CliRunner

from benchmarks.common import cli
from charrnn.errors import ConfigError, CorpusError
from charrnn.model.rnn import CharRNN
from charrnn.windows import rank_slice, stream_batch, window_batches
from train.checkpoint.format import load_for_inference
from train.evaluate import command, evaluate_checkpoints
from train.given_text import GivenText
from train.loop.dataloader import IdSource
from train.loop.evaluation import evaluate, nll_sum, read, sample_text


def plain_nll(model, ids, state):
    """Summed nats of ids[1:] given what comes before, in float64, one call."""
    row = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
    with torch.no_grad():
        logits, state = model.eval()(row[:, :-1], state)
    return -torch.log_softmax(logits.double(), -1).gather(2, row[:, 1:, None]).sum().item()


def test_one_lane_of_stream_is_the_whole_split_read_once(trained):
    model, val = trained.model, trained.data.corpus.val
    config = trained.config.eval.model_copy(update={"stream_lanes": 1})
    figures = evaluate(model, IdSource(val, torch.device("cpu")), config, fresh_accelerator())
    expected = plain_nll(model, val, model.zero_state(1)) / (len(val) - 1)
    assert figures["val/stream/loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["val/stream/bpc"] == pytest.approx(expected / math.log(2), rel=1e-5)


def test_windows_start_from_a_zero_state(trained):
    model, val, window = trained.model, trained.data.corpus.val, 64
    config = trained.config.eval.model_copy(update={"window": window})
    figures = evaluate(model, IdSource(val, torch.device("cpu")), config, fresh_accelerator())
    total = sum(plain_nll(model, val[i : i + window + 1], model.zero_state(1)) for i in range(0, len(val) - 1, window))
    assert figures["val/windows/loss"] == pytest.approx(total / (len(val) - 1), rel=1e-5)


def test_lanes_with_a_warm_up_come_close_to_the_single_stream(trained):
    model, val = trained.model, IdSource(trained.data.corpus.val, torch.device("cpu"))
    one, count = nll_sum(read(model.eval(), val, [stream_batch(len(val), 1, 32)])).tolist()
    four, same = nll_sum(read(model.eval(), val, [stream_batch(len(val), 4, 32)])).tolist()
    assert count == same == len(val) - 1
    assert four / same == pytest.approx(one / count, rel=1e-3)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_ranks_sums_add_up_to_the_whole(trained, world_size):
    model, val = trained.model.eval(), IdSource(trained.data.corpus.val, torch.device("cpu"))
    batches = [stream_batch(len(val), 4, 32), *window_batches(len(val), 50, 4)]
    whole = nll_sum(read(model, val, batches))
    parts = [
        nll_sum(read(model, val, [b.rows(rank_slice(len(b.starts), r, world_size)) for b in batches]))
        for r in range(world_size)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-6, atol=0)


def test_evaluating_changes_nothing_in_the_model_or_the_random_generators(trained):
    trained.model.train()
    before = torch.get_rng_state()
    evaluate(trained.model, trained.data.val, trained.config.eval, fresh_accelerator())
    sample = (trained.model, trained.data.vocab, trained.config.sample, torch.device("cpu"))
    assert len(text := sample_text(*sample)) == trained.config.sample.length
    assert sample_text(*sample) == text
    assert trained.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_an_estimate_of_all_characters_is_the_loss_of_the_protocol_that_decides(trained):
    ids = IdSource(trained.data.corpus.val, torch.device("cpu"))
    accelerator = fresh_accelerator()
    for best_by in ("stream", "windows"):
        config = trained.config.eval.model_copy(update={"best_by": best_by})
        estimate = evaluate(trained.model, ids, config, accelerator, sample=10**6)
        assert list(estimate) == [f"val/{best_by}/loss", f"val/{best_by}/bpc"]
        exact = evaluate(trained.model, ids, config, accelerator)
        assert estimate[f"val/{best_by}/loss"] == pytest.approx(exact[f"val/{best_by}/loss"], rel=0.02)


@pytest.mark.parametrize(("lr", "last_is_better"), [(0.03, True), (1.0, False)])
def test_a_run_of_estimates_ends_with_the_better_of_two_on_the_complete_split(tmp_path, lr, last_is_better):
    """The estimate of step 2 is lucky, so that best/ has its weights; the last ones are better, or far worse."""
    settings = ["eval.sample=64", "eval.every=0", "eval.times=6", f"optim.lr={lr}", "sample.every=4"]
    trainer = make_trainer(tiny_config(tmp_path, settings))
    evaluated = trainer.schedule.evaluated
    trainer.schedule.evaluated = lambda loss: evaluated(0.0 if trainer.progress.step == 2 else loss)
    trainer.fit()
    records = trainer.recorder.records
    estimates = [r for r in records if "val/stream/loss" in r and "val/windows/loss" not in r]
    assert [r["step"] for r in estimates] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "sample" in r] == [8, 12]
    assert (estimates[-1]["val/stream/loss"] < estimates[0]["val/stream/loss"]) == last_is_better
    best = load_for_inference(trainer.checkpoints.run_dir)
    assert best.step == (12 if last_is_better else 2)
    model = CharRNN(best.config.model, len(best.vocab))
    model.load_state_dict(best.weights)
    exact = evaluate(model, trainer.data.val, best.config.eval, fresh_accelerator())
    for name, value in exact.items():
        assert best.trainer["metrics"][name] == value
        assert records[-1][name] == value

    again = make_trainer(trainer.config)
    again.fit()
    assert not [r for r in again.recorder.records if "val/windows/loss" in r]


class StoppedAfter:
    """Stop signals of which one comes once it was asked for so many times."""

    def __init__(self, count):
        self.count, self.received_number = count, 15

    @property
    def received(self):
        self.count -= 1
        return self.received_number if self.count < 0 else 0


@pytest.mark.parametrize("max_steps", [4, 12])
def test_a_stop_cuts_an_evaluation_off_and_the_resumed_run_makes_up_for_it(tmp_path, max_steps):
    """At step 4 of 12, and in the last evaluation."""
    config = tiny_config(tmp_path, [f"train.max_steps={max_steps}", "eval.window=8", "eval.batch_rows=1"])
    signals = StoppedAfter(6)  # five times between updates, then in the evaluation
    trainer = make_trainer(config, signals=signals)
    trainer.fit()
    assert (trainer.control.stopped_by, trainer.progress.step) == (15, 4)
    assert signals.count > -20
    assert not any("val/stream/loss" in r for r in trainer.recorder.records)

    resumed = make_trainer(config)
    resumed.fit()
    assert [r["step"] for r in resumed.recorder.records if "val/stream/loss" in r] == list(range(4, max_steps + 1, 4))


def figures_on(trained, *part):
    """What train.evaluate finds of the run on a part of its own text."""
    run_dir = trained.checkpoints.run_dir
    return evaluate_checkpoints([run_dir], GivenText(), *part)[str(run_dir)]


def test_a_checkpoints_figures_are_those_of_its_training(trained):
    figures = figures_on(trained, "val")
    best = load_for_inference(trained.checkpoints.run_dir).trainer["metrics"]
    for protocol in ("stream", "windows"):
        assert figures[f"val/{protocol}/loss"] == pytest.approx(best[f"val/{protocol}/loss"], rel=1e-6)


def test_another_part_is_named_and_an_impossible_one_refused(trained):
    assert {"test/stream/loss", "test/windows/bpc"} <= (figures := figures_on(trained, "test", "0.5,0.25,0.25")).keys()
    assert not any(name.startswith("val/") for name in figures)
    with pytest.raises(CorpusError, match="--shares"):
        figures_on(trained, "test")
    with pytest.raises(ConfigError, match="add up to 1"):
        figures_on(trained, "test", "0.5,0.1,0.1")
    with pytest.raises(ConfigError, match="split"):
        figures_on(trained, "test", "half,0.1,0.1")


def test_the_command_prints_what_it_measures(trained):
    ran = CliRunner().invoke(cli(command), [str(trained.checkpoints.run_dir), "--json"])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout) == pytest.approx(figures_on(trained, "val"))
