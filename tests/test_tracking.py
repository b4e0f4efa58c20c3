"""The local record, and trackers that may fail without harm."""

import json
import math
import sys

import pytest
from training import fresh_accelerator
from wandb_log import read_run

from charrnn.config import TrackingConfig
from charrnn.errors import CheckpointError
from train.tracking import MetricsLog, Tracker, open_tracker

CONFIG = {"data": {"batch_size": 8}, "train": {"seed": 5}}


@pytest.fixture(autouse=True)
def _no_key_anywhere(monkeypatch, tmp_path_factory):
    """A machine on which nobody has logged in to W&B."""
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "USERPROFILE", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    fresh_accelerator()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        log.write({"step": step, "train/loss": 1.5, "sample": 'é"\n'})
        assert lines_of(tmp_path / "metrics.jsonl")[-1] == {"step": step, "train/loss": 1.5, "sample": 'é"\n'}


def test_what_json_cannot_hold_is_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "train/loss": math.nan, "train/grad_norm": math.inf})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": None, "train/grad_norm": None}]


@pytest.mark.parametrize("torn", ['{"step": 4, "train/lo', "[]\n", '{"loss": 1}\n', ""])
def test_a_resumed_log_keeps_whole_lines_up_to_its_step_and_drops_the_rest(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4)) + torn)
    MetricsLog(path, 3).write({"step": 4, "again": True})
    assert lines_of(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_anew_begins_an_empty_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    MetricsLog(path, 0).write({"step": 1})
    assert lines_of(path) == [{"step": 1}]


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another --run-dir"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl", 0)


def wandb_segment(run_dir, resumed_step, steps, model_file=None, **fields):
    """One segment of a run tracked by W&B; returns the closing lines."""
    run_dir.mkdir(exist_ok=True)
    tracker = open_tracker(TrackingConfig(tracker="wandb", **fields), run_dir, CONFIG, resumed_step)
    for step in steps:
        tracker.log({"train/loss": 1.0 / step}, step)
        if step % 2 == 0:
            tracker.log({"val/stream/loss": 2.0 / step}, step)
            tracker.log_sample("<b>thou</b>", step)
    return tracker.finish({"val/stream/loss": 0.5}, model_file, steps[-1])


def test_without_a_key_a_run_is_written_offline_whole_and_says_how_to_sync_it(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model.onnx"
    model.write_bytes(b"weights")
    lines = wandb_segment(tmp_path / "run", 0, [1, 2, 3, 4], model)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert lines == [f"tracker   W&B ran offline; to upload: wandb sync {folder.relative_to(tmp_path)}"]
    told = read_run(folder)
    assert told["run"] | {"run_id": ""} == {
        "project": "charrnn", "run_group": "run", "display_name": "run", "run_id": "",
    }  # fmt: skip
    assert told["rows"] == [1, 2, 3, 4]
    assert [told["history"][s]["train/loss"] for s in (1, 2, 3, 4)] == [1.0, 0.5, 1 / 3, 0.25]
    assert told["history"][4]["val/stream/loss"] == 0.5
    assert told["config"]["train"] == {"seed": 5}
    assert told["summary"]["best/val/stream/loss"] == 0.5
    (artifact,) = told["artifacts"]
    assert (artifact.name, artifact.type, list(artifact.aliases)) == ("run-model", "model", ["best", "step-4"])
    assert "warning" not in capfd.readouterr().err.lower()


def test_offline_segments_are_runs_of_one_group(tmp_path):
    run_dir = tmp_path / "owl"
    wandb_segment(run_dir, 0, [1, 2], name="night", group="owls")
    wandb_segment(run_dir, 2, [3, 4], name="night", group="owls")
    told = sorted((read_run(f) for f in (run_dir / "wandb").glob("offline-run-*")), key=lambda t: t["rows"])
    assert [t["run"]["display_name"] for t in told] == ["night", "night-from-2"]
    assert {t["run"]["run_group"] for t in told} == {"owls"}
    assert [t["rows"] for t in told] == [[1, 2], [3, 4]]


def test_the_users_wandb_mode_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb_segment(tmp_path / "run", 0, [1])
    assert not list((tmp_path / "run").rglob("*.wandb"))


class Failing:
    """A backend whose chosen method raises."""

    def __init__(self, method):
        self.method = method
        self.calls = []

    def __getattr__(self, name):
        def call(*_):
            self.calls.append(name)
            if name == self.method:
                raise ConnectionError("no\nroute")
            return ["line"]

        return call


@pytest.mark.parametrize("method", ["log", "log_sample", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_never_called_again(method, capsys):
    backend = Failing(method)
    tracker = Tracker("wandb", lambda: backend)
    for step in (1, 2):
        tracker.log({"train/loss": 1.0}, step)
        tracker.log_sample("x", step)
    assert tracker.finish({}, None, 2) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ConnectionError: no route" in error
    assert "training goes on without it" in error
    assert backend.calls.count(method) == 1


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_folder_that_cannot_be_written_costs_the_tracker_and_not_the_run(tmp_path, capfd, tracker):
    (tmp_path / "file").write_text("")
    opened = open_tracker(TrackingConfig(tracker=tracker), tmp_path / "file" / "run", CONFIG, 0)
    opened.log({"train/loss": 1.0}, 1)
    assert opened.finish({}, None, 1) == []
    assert capfd.readouterr().err.count("training goes on without it") == 1


def test_a_tracker_that_is_not_installed_costs_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    opened = open_tracker(TrackingConfig(tracker="wandb"), tmp_path, CONFIG, 0)
    assert opened.finish({}, None, 1) == []
    assert "training goes on without it" in capsys.readouterr().err


def test_tensorboard_files_hold_every_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = open_tracker(TrackingConfig(tracker="tensorboard"), tmp_path, CONFIG, 0)
    for step in (1, 2, 3):
        opened.log({"train/loss": 1.0 / step}, step)
    opened.log_sample("To be", 3)
    (line,) = opened.finish({}, None, 3)
    assert line == f"tracker   tensorboard --logdir {tmp_path / 'tensorboard'}"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert b"To be" in events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]


def test_no_tracker_imports_none(tmp_path):
    opened = open_tracker(TrackingConfig(tracker="none"), tmp_path, CONFIG, 0)
    opened.log({"train/loss": 1.0}, 1)
    assert opened.finish({}, None, 1) == []
    assert not list(tmp_path.iterdir())
