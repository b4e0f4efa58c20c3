"""Distillation: the loss, the stored targets, and that a run with teachers is resumed and shared out like any other."""

import itertools
import json
import logging
import math

import filelock
import numpy as np
import pytest
import torch
from launches import logged as logged_metrics
from launches import prepare_small_run, train_small
from training import interrupted_and_resumed, largest_difference, logged, make_trainer, refused, some_text, tiny_config
from typer.testing import CliRunner

from benchmarks.common import cli
from charrnn.config import ModelConfig
from charrnn.errors import CheckpointError, ConfigError, PreemptedError
from charrnn.model.rnn import CharRNN, NextCharLoss
from charrnn.windows import stream_batch
from train.checkpoint.format import load_for_inference, model_of
from train.evaluate import command, evaluate_checkpoints
from train.export.exporter import metadata_of
from train.given_text import GivenText
from train.loop.cuda_graph import DirectCapture, GraphedStep

TEACHERS = {"one": ["model.rnn=LSTM", "train.seed=3"], "two": ["model.hidden_dim=24"]}
LEARNING = ["optim.lr=0.02", "train.max_steps=60", "eval.every=0"]


def teach(folder, assignments=(), text=None):
    """The assignments of a student of two trained teachers of other sizes and cells, in `folder`."""
    for name, settings in TEACHERS.items():
        if not (folder / name).exists():
            make_trainer(
                tiny_config(folder, [f"train.run_dir={folder / name}", *LEARNING, *settings, *assignments], text)
            ).fit()
    return [*assignments, "distill.teachers=" + json.dumps([str(folder / name) for name in TEACHERS])]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    return folder, teach(folder)


def student(taught, name, *assignments, **options):
    folder, settings = taught
    config = tiny_config(folder, [*settings, f"train.run_dir={folder / name}", *assignments])
    return make_trainer(config, **options)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def mean_probabilities(models, ids, temperature=1.0):
    """(N - 1, V): of each character but the first given all before it, each model reading `ids` in one call."""
    row = torch.from_numpy(np.asarray(ids, np.int64))[None, :-1]
    with torch.no_grad():
        each = [torch.softmax(m.eval()(row, m.zero_state(1))[0][0].double() / temperature, -1) for m in models]
    return torch.stack(each).mean(0)


# --- the loss


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.9, 2.5), (1.0, 0.5)])
def test_loss_is_the_formula(weight, temperature):
    torch.manual_seed(0)
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=6), 5).double()
    window = torch.randint(5, (3, 8))
    targets = torch.softmax(torch.randn(3, 7, 5), -1).half()
    state = tuple(part.double() for part in model.zero_state(3))
    loss, _ = NextCharLoss(model, weight, temperature)(window, state, targets)
    logits = model(window[:, :-1], state)[0].detach().numpy()
    hard = soft = 0.0
    for row, t in itertools.product(range(3), range(7)):
        z = logits[row, t]
        hard -= z[window[row, t + 1]] - math.log(sum(math.exp(v) for v in z))
        z = z / temperature
        norm = math.log(sum(math.exp(v) for v in z))
        soft -= sum(float(p) * (v - norm) for p, v in zip(targets[row, t], z, strict=True))
    expected = ((1 - weight) * hard + weight * temperature**2 * soft) / 21
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_weight_0_is_plain_training_bit_for_bit(taught):
    plain = student(taught, "plain", "distill.teachers=[]", "model.dropout=0.2")
    plain.fit()
    idle = student(taught, "idle", "distill.weight=0", "model.dropout=0.2")
    idle.fit()
    assert idle.data.targets
    assert not plain.data.targets
    assert torch.equal(weights(plain), weights(idle))
    assert plain.recorder.losses() == idle.recorder.losses()
    taught_for_real = student(taught, "real", "model.dropout=0.2")
    taught_for_real.fit()
    assert not torch.equal(weights(plain), weights(taught_for_real))
    assert plain.recorder.losses() != taught_for_real.recorder.losses()


# --- the targets


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_are_the_mean_softmax_of_reading_from_the_start(tmp_path, temperature, monkeypatch):
    monkeypatch.setattr("train.loop.distill.LANES", 5)
    monkeypatch.setattr("train.loop.distill.WARMUP", 64)
    config, beats = tiny_config(tmp_path, [*teach(tmp_path), f"distill.temperature={temperature}"]), []
    trainer = make_trainer(config, heartbeat=lambda *_: beats.append(_))
    assert len(beats) > 3  # the watchdog hears of the computation
    ids = trainer.data.corpus.train
    models = [model_of(load_for_inference(tmp_path / name)) for name in TEACHERS]
    expected = mean_probabilities(models, ids, temperature)  # (N - 1, V)
    batch = stream_batch(len(ids), 5, 64)
    assert len(batch.starts) == 5
    seams = batch.starts[1:] + 64  # the first position that each row but the first gives
    found = trainer.data.targets.windows(np.array([0]), len(ids) - 1)[0].double()  # (N - 1, V)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[: seams[0]], expected[: seams[0]], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)  # a warm-up is not all of the text
    torch.testing.assert_close(found[seams], expected[seams], rtol=0.02, atol=1e-3)
    untrained = mean_probabilities([CharRNN(models[0].config, len(trainer.data.vocab))], ids)
    assert (found - untrained).abs().max() > 0.1


def test_a_batchs_targets_belong_to_its_characters(taught):
    trainer = student(taught, "belong")
    batch, window, targets = trainer.data.read(3)
    everything = trainer.data.targets.windows(np.array([0]), len(trainer.data.train) - 1)[0]
    assert targets.shape == (*window[:, 1:].shape, len(trainer.data.vocab))
    for start, row in zip(batch.starts, targets, strict=True):
        assert torch.equal(row, everything[start : start + len(row)])


def test_documents_reset_the_teachers(tmp_path):
    poems = [json.dumps({"text": f"the owl {'watches ' * i}over {i} foxes"}) for i in range(150)]
    (tmp_path / "poems.jsonl").write_text("\n".join(poems))
    settings = teach(tmp_path, [f"data.source={tmp_path / 'poems.jsonl'}", "data.document_end=|"])
    trainer = make_trainer(tiny_config(tmp_path, settings))
    ends = np.flatnonzero(trainer.data.corpus.train[:-1] == trainer.data.vocab.document_end_id)
    after = trainer.data.targets.windows(ends, 1)[:, 0]  # (D, V)
    assert len(after) > 10
    assert torch.equal(after, after[:1].expand_as(after))
    before = trainer.data.targets.windows(ends - 1, 1)[:, 0]  # after the same letters, in documents of other lengths
    assert not torch.equal(before, before[:1].expand_as(before))


def test_large_vocabularies_are_distilled(tmp_path):
    text = "".join(chr(0x4E00 + i % 251) for i in range(0, 40_000, 7))
    trainer = make_trainer(tiny_config(tmp_path, [*teach(tmp_path, text=text), "optim.lr=0.02"]))
    models = [model_of(load_for_inference(tmp_path / name)) for name in TEACHERS]
    expected, found = (
        mean_probabilities(models, trainer.data.corpus.train)[:200],
        trainer.data.targets.windows(np.array([0]), 200)[0].double(),
    )
    largest = expected.topk(64)
    share = largest.values / largest.values.sum(-1, keepdim=True)
    torch.testing.assert_close(found.gather(1, largest.indices), share, rtol=2e-3, atol=1e-5)
    assert int((found > 0).sum(-1).max()) <= 64
    trainer.fit()
    assert trainer.recorder.losses()[12] < trainer.recorder.losses()[1]


# --- generated text

GENERATED = 5 * 1024 + 300  # five rows


def test_generated_text_continues_the_split_by_what_the_teachers_predict(taught, monkeypatch):
    monkeypatch.setattr("train.loop.distill.WARMUP", 64)
    monkeypatch.setattr("train.loop.distill._CHUNK", 100)
    trainer = student(taught, "generating", f"distill.generated={GENERATED}")
    data, models = trainer.data, [model_of(load_for_inference(taught[0] / name)) for name in TEACHERS]
    split, length = len(data.corpus.train), GENERATED // 5
    assert len(data.train) == split + 5 * length == data.plan.num_chars
    ids = data.train.windows(np.array([0]), len(data.train))[0].numpy()
    assert (ids[:split] == data.corpus.train).all()
    for row, start in enumerate(np.linspace(0, split - 64, 5).astype(int)):
        begin = split + row * length
        generated = ids[begin : begin + length]
        expected = mean_probabilities(models, [*ids[start : start + 64], *generated])[63:]  # of each generated one
        found = data.targets.windows(np.array([begin]), length - 1)[0].double()
        torch.testing.assert_close(found, expected[1:], rtol=2e-3, atol=1e-5)
        drawn = expected[torch.arange(length), torch.from_numpy(generated)]
        entropy = -(expected * expected.log()).sum(-1)
        assert -drawn.log().mean().item() == pytest.approx(entropy.mean().item(), abs=0.15)
    assert len({ids[split + r * length :][:length].tobytes() for r in range(5)}) == 5
    assert not data.targets.windows(np.array([split - 1]), 1).any()
    assert data.targets.windows(np.array([len(ids) - 1]), 1).any()


def test_generated_text_is_trained_on_and_only_on(taught):
    plain, more = student(taught, "without"), student(taught, "with", f"distill.generated={GENERATED}")
    assert more.data.plan.steps_per_epoch > plain.data.plan.steps_per_epoch
    assert len(more.data.val) == len(plain.data.val)
    more.fit()
    with pytest.raises(CheckpointError, match=r"distill\.generated is 5420 there and 0 here"):
        student(taught, "with")
    assert more.progress.step == student(taught, "with", f"distill.generated={GENERATED}").progress.step == 12


@pytest.mark.parametrize("assigned", [["distill.teachers=[]"], ["distill.temperature=2"]])
def test_text_is_generated_by_teachers_at_temperature_1(taught, assigned):
    with pytest.raises(ConfigError, match=r"generated needs teachers, which generate at temperature 1"):
        student(taught, "refused", "distill.generated=10", *assigned)


# --- runs


@pytest.mark.parametrize(("windows", "generated"), [("sliding", 0), ("carry", 0), ("carry", 700)])
def test_resume_with_teachers_is_bit_exact(tmp_path, windows, generated):
    settings = [*teach(tmp_path), f"data.windows={windows}", "model.dropout=0.3", "data.seq_len=8"]
    settings += [f"distill.generated={generated}"]
    complete = make_trainer(tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / 'complete'}"]))
    complete.fit()
    resumed = interrupted_and_resumed(tiny_config(tmp_path, settings), stop_at=8, resumes_at=5)
    assert torch.equal(weights(complete), weights(resumed))
    assert resumed.recorder.losses() == {s: v for s, v in complete.recorder.losses().items() if s > 5}


def test_resume_refuses_other_teachers(taught, tmp_path):
    folder, _ = taught
    student(taught, "changed").fit()
    with pytest.raises(CheckpointError, match=r"distill\.teachers is .* there and \(\) here"):
        student(taught, "changed", "distill.teachers=[]")
    (folder / "one").rename(tmp_path / "one")
    (folder / "one").symlink_to(folder / "two")
    try:
        with pytest.raises(CheckpointError, match="not those that the run began with; restore them"):
            student(taught, "changed")
    finally:
        (folder / "one").unlink()
        (tmp_path / "one").rename(folder / "one")
    assert student(taught, "changed").progress.step == 12


def test_accumulation_with_teachers_does_not_change_the_losses(taught):
    curves = []
    for parts in (1, 2, 4):
        trainer = student(taught, f"parts-{parts}", f"train.accumulation_steps={parts}", "train.noise_scale_every=3")
        trainer.fit()
        assert trainer.noise_scale.noise
        curves.append([*trainer.recorder.losses().values()])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_static_buffers_with_teachers_equal_eager(taught):
    eager, graphed = student(taught, "eager", "data.windows=carry"), student(taught, "graphed", "data.windows=carry")
    update = graphed.update
    update.graphed = GraphedStep(update.compute, update.optimizer, update.state, 16, DirectCapture())
    for _ in range(6):
        eager.train_step()
        graphed.train_step()
    assert torch.equal(weights(eager), weights(graphed))


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(tmp_path):
    prepare_small_run(tmp_path)
    train_small(tmp_path, 1, "--run-dir", "teacher")
    curves = {}
    for processes in (1, 2):
        run = f"by-{processes}"
        output = train_small(
            tmp_path, processes, "--teacher", "teacher", "--run-dir", run, "--set", f"data.cache_dir=data-{processes}"
        )
        assert output.count("done in") == 1
        curves[processes] = [*logged_metrics(tmp_path / run).values()]
    assert len(curves[1]) == 12
    assert largest_difference(curves[2], curves[1]) < 1e-5
    assert largest_difference([*logged_metrics(tmp_path / "teacher").values()], curves[1]) > 1e-3


@pytest.mark.slow
def test_a_student_of_a_good_teacher_beats_the_same_model_without(tmp_path):
    """The teacher has read 50 times as much of the same language."""
    settings = ["model.hidden_dim=48", "optim.lr=0.01", "data.windows=carry", "sample.length=0", "eval.every=50"]
    (tmp_path / "long").mkdir()
    teacher = [*settings, "data.batch_size=16", "data.seq_len=32", "train.max_steps=500"]
    make_trainer(tiny_config(tmp_path / "long", teacher, some_text(100_000, seed=1))).fit()
    settings += ["train.max_steps=300", "data.seq_len=32", "data.split=[0.5,0.5,0.0]"]
    best = {}
    for name, teachers in (("plain", []), ("taught", [str(tmp_path / "long" / "run")])):
        assignments = [f"distill.teachers={json.dumps(teachers)}", f"train.run_dir={tmp_path / name}"]
        trainer = make_trainer(tiny_config(tmp_path, [*settings, *assignments], some_text(4000)))
        trainer.fit()
        best[name] = load_for_inference(tmp_path / name).trainer["metrics"]["val/stream/loss"]
    assert best["taught"] < best["plain"] - 0.02


# --- the cache


def stored(taught):
    folder, _ = taught
    return min((folder / "data" / "targets").glob("*/targets.bin"), key=lambda path: path.stat().st_size)


def test_targets_are_computed_once(taught):
    student(taught, "first")
    with logged() as messages:
        student(taught, "second", "train.seed=9", "distill.weight=0.5")
    assert [m for m in messages if "probabilities from" in m]
    assert not [m for m in messages if "done in" in m]


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "foreign", "unreadable"])
def test_damaged_targets_are_computed_again(taught, damage, caplog):
    expected = student(taught, "intact").data.targets.windows(np.array([100]), 50)
    path = stored(taught)
    content, meta = path.read_bytes(), path.with_name("meta.json")
    if damage == "flipped":
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        meta.write_text(meta.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    else:
        meta.write_text("{")
    with caplog.at_level(logging.INFO, "charrnn"):
        again = student(taught, "intact").data.targets
    assert caplog.text.count("was damaged and is made again") == 1
    assert torch.equal(again.windows(np.array([100]), 50), expected)
    assert path.read_bytes() == content
    assert not [p for p in path.parent.parent.iterdir() if p.name.startswith(f".{path.parent.name}.") and p.is_dir()]


class Stopped:
    received = 15


def test_a_stop_signal_ends_the_computation_and_leaves_nothing(tmp_path):
    config = tiny_config(tmp_path, teach(tmp_path))
    with pytest.raises(PreemptedError, match=r"stopped by SIGTERM before .* rerun the same command"):
        make_trainer(config, signals=Stopped())
    assert not list((tmp_path / "data" / "targets").glob("**/targets.bin"))


class Releasing:
    """Stop signals of which none comes; when it is asked for one, the other process is done."""

    def __init__(self, held):
        self.held = held

    @property
    def received(self):
        self.held.release()
        return 0


def test_a_run_waits_for_another_that_computes_the_same(taught):
    expected = student(taught, "waits").data.targets.windows(np.array([100]), 50)
    folder = stored(taught).parent
    held = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    held.acquire()
    with logged() as messages:
        found = student(taught, "waits", signals=Releasing(held)).data.targets
    assert len([m for m in messages if "waiting for another process" in m]) == 1
    assert len([m for m in messages if "probabilities from" in m]) == 1
    assert torch.equal(found.windows(np.array([100]), 50), expected)


def test_a_teacher_that_has_read_the_validation_text_is_warned_of(taught):
    for split, warned in (([0.8, 0.2, 0.0], True), ([0.9, 0.05, 0.05], False), ([0.95, 0.05, 0.0], False)):
        with logged(logging.WARNING) as messages:
            student(taught, f"split-{split[0]}", f"data.split={split}")
        assert len([m for m in messages if "trained on 90.0% of this text" in m]) == len(TEACHERS) * warned


# --- errors, export, evaluation


def test_the_model_file_names_its_teachers_without_their_folders(taught):
    trainer = student(taught, "exported")
    trainer.fit()
    metadata = metadata_of(load_for_inference(trainer.checkpoints.run_dir))
    assert json.loads(metadata["charrnn.config"])["distill"]["teachers"] == [*TEACHERS]
    assert str(taught[0]) not in "".join(metadata.values())


def test_user_errors_are_one_line(taught, tmp_path):
    folder, _ = taught
    (tmp_path / "other.txt").write_text("Zebra & quagga\n" * 200)
    for teacher, text, expected in (
        (folder / "one", "other.txt", "has a vocabulary of 28 chars, the run one of 11 chars, which differ in"),
        (folder / "none", folder / "words.txt", "no run or checkpoint folder"),
        (folder / "words.txt", folder / "words.txt", "is a file; name the run folder"),
    ):
        options = ("--data", text, "--max-steps", 2, "--init-from", "none", "--teacher", teacher)
        assert expected in refused(tmp_path, *options).splitlines()[-1]


def test_evaluation_scores_each_and_the_mean_of_the_probabilities(taught, tmp_path):
    folder, _ = taught
    paths = [folder / name for name in TEACHERS]
    done, shown = (CliRunner().invoke(cli(command), [*map(str, paths), *more]).stdout for more in (["--json"], []))
    found = json.loads(done)
    assert [*found] == [*map(str, paths), "mean"]
    assert shown.count("val/stream") == 3
    assert f"{found['mean']['val/stream/loss']:.4f}" in shown
    models = [model_of(load_for_inference(path)) for path in paths]
    val = student(taught, "for-val").data.corpus.val
    expected = -mean_probabilities(models, val).log()[np.arange(len(val) - 1), val[1:].astype(int)].mean().item()
    assert found["mean"]["val/stream/loss"] == pytest.approx(expected, rel=2e-3)
    nats = 0.0
    for start in range(0, len(val) - 1, 256):
        part = val[start : start + 257]
        nats -= mean_probabilities(models, part).log()[np.arange(len(part) - 1), part[1:].astype(int)].sum().item()
    assert found["mean"]["val/windows/loss"] == pytest.approx(nats / (len(val) - 1), rel=1e-5)
    worst = max(found[str(path)]["val/windows/loss"] for path in paths)
    assert found["mean"]["val/windows/loss"] < worst
    make_trainer(tiny_config(tmp_path, text="Zebra & quagga\n" * 200)).fit()
    with pytest.raises(CheckpointError, match="train both on the same text"):
        evaluate_checkpoints([paths[0], tmp_path / "run"], GivenText(), "val")
