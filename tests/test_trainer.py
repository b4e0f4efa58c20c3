"""The loop: what a step computes, and that a run cut off and resumed is the run that was not."""

import itertools
import math

import pytest
import torch
from training import ListRecorder, interrupted_and_resumed, make_trainer, tiny_config

from charrnn.config import ModelConfig
from charrnn.errors import CheckpointError, TrainingError
from charrnn.model.rnn import CharRNN
from charrnn.vocab import Vocab
from charrnn.windows import WindowPlan
from infer import Engine
from train.checkpoint.format import load_for_inference, load_newest, step_folders
from train.checkpoint.vocab_transfer import transfer_weights
from train.export.exporter import export_checkpoint
from train.loop.errors import memory_explained
from train.summary import text_lines

CELLS = ("GRU", "LSTM")
MODES = ("sliding", "carry")


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(("rnn", "windows"), list(itertools.product(CELLS, MODES)))
def test_resume_equals_uninterrupted_run(tmp_path, rnn, windows):
    settings = [f"model.rnn={rnn}", f"data.windows={windows}", "model.dropout=0.3", "data.seq_len=8"]
    whole = make_trainer(tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / 'whole'}"]))
    whole.fit()

    resumed = interrupted_and_resumed(tiny_config(tmp_path, settings), stop_at=8, resumes_at=5)

    assert same_weights(whole.model, resumed.model)
    tail = {s: loss for s, loss in whole.recorder.losses().items() if s > 5}
    assert resumed.recorder.losses() == tail
    best, resumed_best = (load_for_inference(t.checkpoints.run_dir) for t in (whole, resumed))
    assert best.step == resumed_best.step
    assert all(torch.equal(best.weights[k], resumed_best.weights[k]) for k in best.weights)

    again = make_trainer(tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / 'again'}"]))
    torch.manual_seed(999)  # without the random generators a run with dropout is another one
    again.fit()
    assert not same_weights(whole.model, again.model)


@pytest.mark.parametrize(("rnn", "windows"), list(itertools.product(CELLS, MODES)))
def test_accumulation_does_not_change_the_losses(tmp_path, rnn, windows):
    curves = []
    for parts in (1, 2, 4):
        settings = [f"model.rnn={rnn}", f"data.windows={windows}", f"train.accumulation_steps={parts}"]
        trainer = make_trainer(tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / str(parts)}"]))
        trainer.fit()
        curves.append(list(trainer.recorder.losses().values()))
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_the_first_loss_is_the_mean_negative_log_likelihood_of_the_batch(tmp_path):
    config = tiny_config(tmp_path, ["train.max_steps=1"])
    trainer = make_trainer(config)
    untrained = CharRNN(config.model, len(trainer.data.vocab))
    untrained.load_state_dict(trainer.model.state_dict())
    trainer.train_step()
    trainer.log()
    plan = WindowPlan(len(trainer.data.corpus.train), 16, 8, "sliding", 0, config.train.seed)
    total = 0.0
    for start in plan.batch(0).starts:
        ids = torch.from_numpy(trainer.data.corpus.train[start : start + 17].astype("int64"))[None]
        logits, _ = untrained(ids[:, :-1], untrained.zero_state(1))
        total -= torch.log_softmax(logits.double(), -1).gather(2, ids[:, 1:, None]).sum().item()
    assert trainer.recorder.losses()[1] == pytest.approx(total / (8 * 16), rel=1e-5)
    assert trainer.recorder.losses()[1] == pytest.approx(math.log(len(trainer.data.vocab)), rel=0.1)


def test_lanes_that_begin_afresh_forget_and_the_others_go_on(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, ["data.windows=carry", "data.reset=0.5", "model.rnn=LSTM"]))
    trainer.train_step()
    assert trainer.update.state[0].shape == (2, 8, 16)
    assert not trainer.update.state[0].requires_grad
    batch = trainer.data.plan.batch(1)
    assert 0 < batch.reset.sum() < len(batch.reset)
    for part, carried in zip(trainer.update.state_before(batch.reset), trainer.update.state, strict=True):
        assert carried.abs().sum(dim=(0, 2)).all()
        assert not part[:, batch.reset].any()
        assert torch.equal(part[:, ~batch.reset], carried[:, ~batch.reset])


def test_gradients_are_clipped_to_the_global_norm(tmp_path):
    for clip in (0.01, 0.0):
        trainer = make_trainer(tiny_config(tmp_path, [f"optim.grad_clip={clip}"]))
        seen = []
        step = trainer.update.optimizer.step
        trainer.update.optimizer.step = lambda s=step, t=trainer, n=seen: (
            n.append(math.sqrt(sum(p.grad.square().sum().item() for p in t.model.parameters()))),
            s(),
        )
        trainer.train_step()
        trainer.log()
        told = trainer.metrics.latest["train/grad_norm"]
        assert told > 0.01
        assert seen[0] == pytest.approx(clip or told, rel=1e-3)


def test_divergence_stops_the_run_with_the_figures_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(tmp_path, ["train.max_steps=10", "log.every=3"])
    trainer = make_trainer(config)
    original = trainer.train_step

    def poisoned():
        if trainer.progress.step == 7:
            with torch.no_grad():
                trainer.model.head.bias[0] = float("nan")
        original()

    trainer.train_step = poisoned
    with pytest.raises(TrainingError, match=r"diverged at step 8: loss nan, learning rate .*gradient norm nan"):
        trainer.fit()
    saved = load_newest(trainer.checkpoints.run_dir)
    assert saved.step == 5
    assert all(torch.isfinite(t).all() for t in saved.weights.values())


def test_out_of_memory_names_the_settings_to_lower(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path))

    def out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.train_step = out
    lower = r"data\.batch_size \(now 8\), data\.seq_len \(now 16\) or model\.hidden_dim"
    with pytest.raises(TrainingError, match=lower), memory_explained(trainer.config):
        trainer.fit()


def test_only_the_last_two_step_checkpoints_and_the_best_are_kept(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, ["checkpoint.every=2"]))
    trainer.fit()
    assert [p.name for p in step_folders(trainer.checkpoints.run_dir)] == ["step-00000012", "step-00000010"]
    best = load_for_inference(trainer.checkpoints.run_dir)
    losses = {r["step"]: r["val/stream/loss"] for r in trainer.recorder.records if "val/stream/loss" in r}
    assert best.step == min(losses, key=losses.get)
    assert best.trainer["metrics"]["val/stream/loss"] == losses[best.step]


def test_early_stopping_decays_the_rate_and_then_ends(tmp_path, caplog):
    settings = ["optim.lr=1e-12", "eval.patience=2", "eval.every=1", "train.max_steps=50", "optim.weight_decay=0"]
    trainer = make_trainer(tiny_config(tmp_path, settings))
    trainer.fit()
    progress = trainer.progress
    assert progress.cooldown_step - progress.best_step == 2
    assert progress.step - progress.cooldown_step == 2  # as many steps again
    rates = {r["step"]: r["train/lr"] for r in trainer.recorder.records if "train/lr" in r}
    assert rates[progress.cooldown_step] > 0.9e-12
    assert rates[progress.step] == pytest.approx(1e-12 * trainer.config.optim.final_lr)
    assert "decaying the learning rate" in caplog.text


def fine_tuned(folder, text, assignments=(), **options):
    """A trainer on `text` that starts from the run in `folder`."""
    (folder / "words.txt").write_text(text)
    return make_trainer(tiny_config(folder, [f"train.run_dir={folder / 'second'}", *assignments]), **options)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A finished run, to start others from."""
    trainer = make_trainer(tiny_config(tmp_path_factory.mktemp("origin")))
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (
            "Zebra & quagga\n",
            ["data.vocab=keep"],
            r"2 character\(s\) that the model .* '&', 'Z'.*leave out --vocab keep",
        ),
        ("the owl\n", ["data.vocab=bytes"], "vocabulary of chars, the corpus of bytes"),
        ("the owl\n", ["model.rnn=LSTM"], r"model\.rnn is GRU there and LSTM here"),
        ("the owl\n", ["train.init_from=README.md"], "is a file; name the run folder"),
        ("the owl\n", ["train.init_from=none", "data.vocab=keep"], "name it with --init-from"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, origin, text, settings, message):
    settings = [f"train.init_from={origin.checkpoints.run_dir}", *settings]
    with pytest.raises(CheckpointError, match=message):
        fine_tuned(tmp_path, text * 400, settings)


def test_a_known_vocabulary_is_kept_with_the_weights(tmp_path, origin):
    text = "the owl over the fox\n"
    second = fine_tuned(tmp_path, text * 200, ["data.vocab=keep"], init_from=origin.checkpoints.run_dir)
    assert second.progress.step == 0
    assert second.data.vocab == origin.data.vocab
    assert len(second.data.corpus.vocab) < len(second.data.vocab)
    best = load_for_inference(origin.checkpoints.run_dir)
    assert all(torch.equal(second.model.state_dict()[k], best.weights[k]) for k in best.weights)
    window = second.data.train.windows(second.data.plan.batch(0).starts[:1], 9)
    assert second.data.vocab.decode(window[0].tolist()) in text * 3


def test_fine_tuning_keeps_what_is_known_and_starts_new_characters_from_the_mean(tmp_path, origin):
    second = fine_tuned(tmp_path, "Zebra & quagga\n" * 200, init_from=origin.checkpoints.run_dir)
    assert second.data.vocab.symbols == (*origin.data.vocab.symbols, "&", "Z")
    old, new = load_for_inference(origin.checkpoints.run_dir).weights, second.model.state_dict()
    for name in old:
        assert torch.equal(new[name][: len(old[name])], old[name])
    for name in ("embedding.weight", "head.weight", "head.bias"):
        assert torch.allclose(new[name][-2:], old[name].mean(0, keepdim=True).expand_as(new[name][-2:]), atol=1e-6)
    window = second.data.train.windows(second.data.plan.batch(0).starts[:1], 9)
    assert second.data.vocab.decode(window[0].tolist()) in "Zebra & quagga\n" * 3
    assert "2 character(s)" in (line := text_lines(second.data, ("&", "Z"))[1])
    assert "'&', 'Z'" in line


@pytest.mark.parametrize("count", [1, 7])
def test_new_characters_cost_the_old_ones_at_most_their_share(count):
    torch.manual_seed(0)
    model = CharRNN(ModelConfig(embedding_dim=8, hidden_dim=16), 20)
    wider = CharRNN(ModelConfig(embedding_dim=8, hidden_dim=16), 20 + count)
    known = Vocab.of_chars(map(chr, range(97, 117)))
    wanted = known.extended_by(Vocab.of_chars(map(chr, range(200, 200 + count))))
    wider.load_state_dict(transfer_weights({k: v * 5 for k, v in model.state_dict().items()}, known, wanted))
    model.load_state_dict({k: v * 5 for k, v in model.state_dict().items()})
    ids = torch.randint(20, (4, 32))
    before = torch.log_softmax(model(ids, model.zero_state(4))[0], 2)
    after = torch.log_softmax(wider(ids, wider.zero_state(4))[0], 2)
    cost = before - after[:, :, :20]
    assert cost.min() > 0
    assert cost.max() <= math.log(1 + count / 20) + 1e-5


def test_a_fine_tuned_run_resumes_bit_for_bit_and_exports(tmp_path, origin):
    text = "Zebra & quagga, a lazy fox\n" * 150
    whole = fine_tuned(tmp_path, text, init_from=origin.checkpoints.run_dir)
    whole.fit()
    again = [f"train.run_dir={tmp_path / 'third'}"]
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(tmp_path, text, again, recorder=ListRecorder(stop_at=8), init_from=origin.checkpoints.run_dir).fit()
    resumed = fine_tuned(tmp_path, text, again)
    assert resumed.progress.step == 5
    assert resumed.data.vocab == whole.data.vocab
    resumed.fit()
    assert same_weights(whole.model, resumed.model)
    export_checkpoint(load_for_inference(tmp_path / "third"), tmp_path / "model.onnx")
    engine = Engine(tmp_path / "model.onnx")
    assert engine.vocab == whole.data.vocab
    assert len("".join(engine.generate("Zebra &", length=20))) == 20


def test_without_a_validation_split_the_newest_model_is_the_best(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, ["data.split=[1.0,0.0,0.0]"]))
    trainer.fit()
    assert load_for_inference(trainer.checkpoints.run_dir).step == 12
    assert not any("val/stream/loss" in r for r in trainer.recorder.records)
