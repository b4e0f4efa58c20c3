"""Whole runs under a tracker: segments that read as one, a tracker that breaks, and who creates a run at all."""

import re
import signal

import pytest
from launches import logged, prepare_small_run, python, train_small
from training import fresh_accelerator, stopping_after, tiny_config
from wandb_log import nobody_logged_in, read_run

from charrnn.errors import PreemptedError
from train.run import run


@pytest.fixture(autouse=True)
def _no_key_anywhere(monkeypatch, tmp_path_factory):
    with nobody_logged_in(monkeypatch, tmp_path_factory.mktemp("home")):
        yield


def segment(config):
    fresh_accelerator()
    return run(config, config_name="tiny", resume=True)


def segments_of(run_dir):
    """The offline runs of a run folder, read back, in the order in which they were made."""
    folders = sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda f: f.stat().st_ctime_ns)
    return sorted((read_run(f) for f in folders), key=lambda told: told["config"]["resumed_step"])


def losses(told):
    return {step: row["train/loss"] for step, row in told["history"].items() if "train/loss" in row}


def preempted_after(step, config, monkeypatch):
    """A segment that ends by SIGTERM."""
    with monkeypatch.context() as patch:
        stopping_after(patch, step, signal.SIGTERM)
        with pytest.raises(PreemptedError):
            segment(config)


def test_the_segments_of_a_preempted_run_read_as_one(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, ["tracking.tracker=wandb", "tracking.name=owl"])
    preempted_after(7, config, monkeypatch)
    assert segment(config).exists()
    first, second = segments_of(tmp_path / "run")
    assert [told["run"]["run_group"] for told in (first, second)] == ["owl", "owl"]
    assert [told["run"]["display_name"] for told in (first, second)] == ["owl", "owl-from-7"]
    assert re.search(r"wandb sync \S+wandb/offline-run-\*\n", capsys.readouterr().err)
    assert (first["config"]["resumed_step"], second["config"]["resumed_step"]) == (0, 7)
    assert sorted(losses(first)) == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(losses(second)) == [8, 9, 10, 11, 12]
    assert losses(first) | losses(second) == logged(tmp_path / "run")
    for told in (first, second):
        assert len(told["rows"]) == len(set(told["rows"])), "a step that was logged twice"
        assert told["config"]["optim"]["warmup_steps"] == 2
        assert told["exit_code"] == 0
    assert "best/val/stream/loss" in second["summary"]
    assert [a.name for a in second["artifacts"]] == ["owl-model"]
    assert not first["artifacts"]


def killed_at(step, config, folder):
    """A segment that ends by SIGKILL when the update after `step` begins."""
    (folder / "config.json").write_text(config.model_dump_json())
    program = (
        "import os, signal, sys; from pathlib import Path; from charrnn.config import RunConfig\n"
        "from train.run import run; from train.loop.trainer import Trainer\n"
        "step = Trainer.train_step\n"
        "def killed(trainer):\n"
        "    if trainer.progress.step == int(sys.argv[2]):\n"
        "        trainer.checkpoints.wait()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(trainer)\n"
        "Trainer.train_step = killed\n"
        "config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "run(config, config_name='t', resume=True)"
    )
    done = python("-c", program, folder / "config.json", str(step), ACCELERATE_USE_CPU="true")
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_a_run_killed_twice_has_every_step_once(tmp_path):
    """W&B itself loses what it has not yet written when its process is killed."""
    config = tiny_config(tmp_path, ["tracking.tracker=wandb", "tracking.name=owl", "model.dropout=0.2"])
    killed_at(8, config, tmp_path)
    killed_at(11, config, tmp_path)
    assert segment(config).exists()
    (told,) = segments_of(tmp_path / "run")
    assert sorted(losses(told)) == list(range(1, 13))
    assert losses(told) == logged(tmp_path / "run")
    assert told["run"]["display_name"] == "owl"
    assert len(list((tmp_path / "run" / "wandb").glob("superseded-run-*"))) == 2
    assert sum(any(k.startswith("sample") for k in row) for row in told["history"].values()) == 3


@pytest.mark.slow
def test_only_an_interrupted_segment_is_superseded(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, ["tracking.tracker=wandb", "tracking.name=owl"])
    preempted_after(3, config, monkeypatch)
    killed_at(8, config, tmp_path)
    assert segment(config).exists()
    first, second = segments_of(tmp_path / "run")
    assert (sorted(losses(first)), sorted(losses(second))) == ([1, 2, 3], list(range(4, 13)))
    assert second["run"]["display_name"] == "owl-from-3"
    assert losses(first) | losses(second) == logged(tmp_path / "run")


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_training_continues_without_the_trackers_folder(tmp_path, capfd, tracker):
    config = tiny_config(tmp_path, [f"tracking.tracker={tracker}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / tracker).write_text("a file where the tracker wants its folder")
    assert segment(config).exists()
    assert sorted(logged(tmp_path / "run")) == list(range(1, 13))
    assert capfd.readouterr().err.count("training continues without it") == 1


@pytest.mark.slow
def test_only_the_main_process_creates_a_tracker_run(tmp_path):
    prepare_small_run(tmp_path)
    train_small(tmp_path, 2, "--run-dir", "r", "--tracker", "wandb")
    (folder,) = (tmp_path / "r" / "wandb").glob("offline-run-*")
    run = read_run(folder)
    assert sorted(losses(run)) == list(range(1, 13))
    assert run["exit_code"] == 0
