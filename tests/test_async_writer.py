"""Checkpoints in the background: training goes on meanwhile, nothing that comes later gets in, no failure is lost."""

import errno
import os
import shutil
import threading

import pytest
import torch
from folders import names_in
from training import ListRecorder, fresh_accelerator, make_trainer, tiny_config

from charrnn.errors import CheckpointError, TrainingError
from train import main as command
from train.checkpoint import format as checkpoints
from train.checkpoint.async_writer import CheckpointWriter
from train.checkpoint.format import load, load_for_inference, load_newest, step_folders
from train.loop.trainer import Trainer
from train.run import run

ENDLESS = 30  # seconds; a wait that lasts so long has failed


@pytest.fixture
def gate(monkeypatch):
    """Step checkpoints are written once this is open; `events` tells when one was begun and ended."""

    class Gate(threading.Event):
        def __init__(self):
            super().__init__()
            self.events = []
            self.began = threading.Event()

    gate, save_step = Gate(), checkpoints.save_step

    def slow(run_dir, checkpoint, keep):
        gate.events.append(f"begin {checkpoint.step}")
        gate.began.set()
        assert gate.wait(ENDLESS)
        folder = save_step(run_dir, checkpoint, keep)
        gate.events.append(f"end {checkpoint.step}")
        return folder

    monkeypatch.setattr(checkpoints, "save_step", slow)
    return gate


@pytest.fixture
def state(tmp_path):
    """A checkpoint of two updates, with a carried state."""
    trainer = make_trainer(tiny_config(tmp_path, ["data.windows=carry"]))
    trainer.train_step()
    trainer.train_step()
    return trainer.state_dict()


class DiskFull:
    """A disk that, once it is full, brings `allowed` more files and folders to safety and refuses the rest."""

    def __init__(self, monkeypatch):
        self.full, self.allowed = False, 0  # files and folders
        fsync = os.fsync

        def limited(descriptor):
            if self.full:
                self.allowed -= 1
                if self.allowed < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", limited)

    def fill(self):
        self.full = True


@pytest.fixture
def disk(monkeypatch):
    return DiskFull(monkeypatch)


@pytest.fixture
def ahead_of(monkeypatch):
    """ahead_of(step, action) calls `action` once, ahead of update number `step`, with all before it on the disk."""

    def ahead_of(step, action):
        train_step, called = Trainer.train_step, []

        def patched(trainer):
            if trainer.progress.step == step - 1 and not called:
                called.append(step)
                trainer.checkpoints.wait()
                action()
            train_step(trainer)

        monkeypatch.setattr(Trainer, "train_step", patched)

    return ahead_of


class Calling(ListRecorder):
    """Calls `action` once a record of step `step` comes."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def record(self, values):
        super().record(values)
        if values["step"] == self.step:
            self.action()


def tensors_of(checkpoint):
    """All tensors of a checkpoint, by a name each."""
    named = {f"w.{k}": t for k, t in checkpoint.weights.items()}
    named |= {f"o.{k}": t for k, t in checkpoint.optimizer.items()}
    named |= {f"c.{i}": t for i, t in enumerate(checkpoint.carried)}
    return named | {f"r.{rank}.{k}": t for rank, states in enumerate(checkpoint.rng) for k, t in states.items()}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_training_continues_during_a_write(tmp_path, gate):
    """The write of step 5 ends only after update 9; if training waited for it, it would never end."""
    config = tiny_config(tmp_path, ["eval.every=0", "sample.length=0"])
    recorder = Calling(9, gate.set)
    make_trainer(config, recorder).fit()
    assert gate.events == ["begin 5", "end 5", "begin 10", "end 10", "begin 12", "end 12"]
    assert list(recorder.losses()) == list(range(1, 13))


def test_the_end_of_training_waits_for_the_write(tmp_path, gate):
    config = tiny_config(tmp_path, ["checkpoint.every=0", "eval.every=0"])
    trainer = make_trainer(config)
    threading.Timer(0.1, gate.set).start()
    trainer.fit()
    assert gate.events == ["begin 12", "end 12"]
    assert load_newest(trainer.checkpoints.run_dir).step == 12


def test_the_next_save_waits_for_the_write_in_flight(tmp_path, gate, state, monkeypatch):
    snapshot = checkpoints.snapshot

    def noted(checkpoint):
        gate.events.append("snapshot")
        return snapshot(checkpoint)

    monkeypatch.setattr(checkpoints, "snapshot", noted)
    saver = CheckpointWriter(tmp_path / "saved", keep=2)
    saver.save(state, best=False, step=True)
    assert gate.began.wait(ENDLESS)
    threading.Timer(0.1, gate.set).start()
    saver.save(state, best=False, step=True)
    saver.wait()
    assert gate.events == ["snapshot", "begin 2", "end 2", "snapshot", "begin 2", "end 2"]


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_a_snapshot_excludes_later_in_place_changes(tmp_path, gate, rnn):
    # Of one layer: its state needs no rearranging on the way, so that what is captured is the trainer's own memory.
    settings = [f"model.rnn={rnn}", "model.num_layers=1", "data.windows=carry", "model.dropout=0.2"]
    trainer = make_trainer(tiny_config(tmp_path, settings))
    trainer.train_step()
    trainer.train_step()
    expected = {name: tensor.clone() for name, tensor in tensors_of(trainer.state_dict()).items()}
    trainer.save(step=True)
    assert gate.began.wait(ENDLESS)

    changed = list(trainer.update.state)
    trainer.train_step()
    optimizer = trainer.update.optimizer
    with torch.no_grad():
        changed += [*trainer.model.parameters(), *trainer.update.state]
        changed += [entry for entries in optimizer.state.values() for entry in entries.values()]
        for tensor in changed:
            tensor.fill_(7)
    trainer.metrics.latest["train/loss"] = 7.0
    trainer.progress.step = 99
    gate.set()
    trainer.checkpoints.wait()

    saved = load(step_folders(trainer.checkpoints.run_dir)[0])
    assert saved.step == 2
    assert saved.trainer["metrics"]["step"] == 2
    assert saved.trainer["metrics"].get("train/loss") != 7.0
    assert_same_tensors(tensors_of(saved), expected)
    assert len(expected) > 20


def test_best_and_step_are_written_from_one_snapshot(tmp_path, state, monkeypatch):
    taken = []
    snapshot = checkpoints.snapshot
    monkeypatch.setattr(checkpoints, "snapshot", lambda c: taken.append(snapshot(c)) or taken[-1])
    saver = CheckpointWriter(tmp_path / "saved", keep=2)
    saver.save(state, best=True, step=True)
    saver.wait()
    assert len(taken) == 1
    assert names_in(tmp_path / "saved") == ["best", "step-00000002"]
    step, best = load(tmp_path / "saved" / "step-00000002"), load_for_inference(tmp_path / "saved")
    assert_same_tensors(tensors_of(step), tensors_of(state))
    assert_same_tensors(best.weights, state.weights)
    assert best.optimizer == {}
    for due, names in (("best", ["best"]), ("step", ["step-00000002"])):
        saver = CheckpointWriter(tmp_path / due, keep=2)
        saver.save(state, best=due == "best", step=due == "step")
        saver.wait()
        assert names_in(tmp_path / due) == names


def failed(saver):
    """What `failure` says once the write in flight has ended."""
    while (error := saver.error()) is None:
        pass
    return error


NAMES_THE_DISK = "No space left on device; free space or permissions on the disk that holds {folder}"


@pytest.mark.parametrize("notice", ["failure", "wait", "next save"])
def test_a_failed_write_is_raised_by_wait_and_the_next_save(tmp_path, state, disk, notice):
    saver = CheckpointWriter(tmp_path / "saved", keep=2)
    assert saver.error() is None
    saver.wait()
    disk.full = True
    saver.save(state, best=False, step=True)
    if notice == "failure":
        error = failed(saver)
        assert saver.error() is error  # until it is raised
        disk.full = False
    with pytest.raises(CheckpointError) as caught:
        saver.save(state, best=False, step=True) if notice == "next save" else saver.wait()
    assert NAMES_THE_DISK.format(folder=tmp_path / "saved") in str(caught.value)
    if notice == "failure":
        assert caught.value is error
    assert names_in(tmp_path / "saved") == []

    disk.full = False
    assert saver.error() is None
    saver.save(state, best=False, step=True)
    saver.wait()
    assert names_in(tmp_path / "saved") == ["step-00000002"]


def test_a_defect_in_the_writer_is_raised_as_it_is(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_step", lambda *_: 1 / 0)
    saver = CheckpointWriter(tmp_path / "saved", keep=2)
    saver.save(state, best=False, step=True)
    with pytest.raises(ZeroDivisionError):
        failed(saver)
    with pytest.raises(ZeroDivisionError):
        saver.wait()


@pytest.mark.parametrize("allowed", range(9))
def test_a_disk_that_fills_up_keeps_the_previous_checkpoint(tmp_path, disk, ahead_of, allowed):
    """allowed: how many of a checkpoint's 7 files and 2 folders still reach the disk."""
    disk.allowed = allowed
    ahead_of(7, disk.fill)
    trainer = make_trainer(tiny_config(tmp_path, ["eval.every=0", "sample.length=0"]))
    with pytest.raises(CheckpointError) as caught:
        trainer.fit()
    assert NAMES_THE_DISK.format(folder=trainer.checkpoints.run_dir) in str(caught.value)
    assert "the previous checkpoint is intact" in str(caught.value)
    assert 10 <= trainer.progress.step <= 12
    whole = [5, 10] if allowed == 8 else [5]  # the ninth is the run folder, after the rename
    assert names_in(trainer.checkpoints.run_dir) == [f"step-{step:08d}" for step in whole]
    assert load_newest(trainer.checkpoints.run_dir).step == whole[-1]


def test_a_failed_write_ends_training_before_the_next_step(tmp_path, disk):
    config = tiny_config(tmp_path, ["eval.every=0", "sample.length=0", "train.max_steps=100", "checkpoint.every=50"])
    trainer = make_trainer(config, Calling(57, lambda: failed(trainer.checkpoints)))
    disk.fill()  # once the text is prepared
    with pytest.raises(CheckpointError, match="step-00000050: No space left on device"):
        trainer.fit()
    assert 50 <= trainer.progress.step <= 57


def test_a_disk_full_at_the_last_save_is_reported(tmp_path, disk, ahead_of):
    ahead_of(12, disk.fill)
    config = tiny_config(tmp_path, ["checkpoint.every=0", "eval.every=0", "sample.length=0"])
    with pytest.raises(CheckpointError, match="No space left on device"):
        make_trainer(config).fit()


def test_a_full_disk_is_one_line_and_exit_code_2(tmp_path, disk, ahead_of, monkeypatch, capsys):
    fresh_accelerator()
    config = tiny_config(tmp_path, ["train.threads=1"])
    ahead_of(7, disk.fill)
    monkeypatch.setattr(command, "app", lambda: run(config, config_name="tiny", resume=True))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: cannot write checkpoint {tmp_path}/run/")
    assert NAMES_THE_DISK.format(folder=tmp_path / "run") in last


def test_a_failed_pruning_is_a_checkpoint_error(tmp_path, monkeypatch):
    def stale(folder):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))

    trainer = make_trainer(tiny_config(tmp_path, ["eval.every=0", "checkpoint.every=2", "checkpoint.keep=1"]))
    monkeypatch.setattr(shutil, "rmtree", stale)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ESTALE)):
        trainer.fit()


def test_an_error_in_training_lets_the_write_finish(tmp_path, gate):
    """A rank of several leaves without the interpreter's tear-down, which would wait for the writer."""

    def corrupted():
        threading.Timer(1, gate.set).start()
        raise TrainingError("corrupted")

    config = tiny_config(tmp_path, ["eval.every=0", "sample.length=0"])
    with pytest.raises(TrainingError, match="corrupted"):
        make_trainer(config, Calling(7, corrupted)).fit()
    events = list(gate.events)
    gate.set()
    assert events == ["begin 5", "end 5"]


def fill_up(folder, spare_pages):
    """Writes a file that leaves `spare_pages` of the disk free."""
    free = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes((free.f_bavail - spare_pages) * free.f_frsize))
    assert os.statvfs(folder).f_bavail == spare_pages


@pytest.mark.parametrize("spare_pages", [0, 1, 2, 9])
def test_after_a_full_tmpfs_resume_is_exact(tmp_path, small_disk, ahead_of, spare_pages):
    settings = ["data.windows=carry", "model.dropout=0.2", "eval.every=4", "sample.length=0"]
    whole = make_trainer(tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / 'whole'}"]))
    whole.fit()

    config = tiny_config(tmp_path, [*settings, f"train.run_dir={small_disk / 'run'}"])
    ahead_of(9, lambda: fill_up(small_disk, spare_pages))
    with pytest.raises(CheckpointError) as caught:
        make_trainer(config).fit()
    assert NAMES_THE_DISK.format(folder=small_disk / "run") in str(caught.value)
    assert names_in(small_disk / "run") == ["best", "step-00000004", "step-00000005"]
    assert load_newest(small_disk / "run").step == 5
    assert load_for_inference(small_disk / "run").step == 8

    (small_disk / "ballast").unlink()
    resumed = make_trainer(config)
    assert resumed.progress.step == 5
    resumed.fit()
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    tail = {step: loss for step, loss in whole.recorder.losses().items() if step > 5}
    assert resumed.recorder.losses() == tail
    assert_same_tensors(load_for_inference(small_disk / "run").weights, load_for_inference(tmp_path / "whole").weights)
