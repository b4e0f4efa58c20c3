"""metrics.jsonl, and trackers whose failure does not end training."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from wandb_log import nobody_logged_in, read_run

from benchmarks.training import read_metrics
from charrnn.config import TrackingConfig
from charrnn.errors import CheckpointError
from train.tracking.metrics_log import MetricsLog
from train.tracking.recorder import Recorder, make_tracker

CONFIG = {"data": {"batch_size": 8}, "train": {"seed": 5}}


@pytest.fixture(autouse=True)
def _no_key_anywhere(monkeypatch, tmp_path_factory):
    with nobody_logged_in(monkeypatch, tmp_path_factory.mktemp("home")):
        yield


def test_every_record_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        log.write({"step": step, "train/loss": 1.5, "sample": 'é"\n'})
        assert read_metrics(tmp_path)[-1] == {"step": step, "train/loss": 1.5, "sample": 'é"\n'}
    log.write({"step": 3, "train/loss": math.nan, "train/grad_norm": math.inf})
    assert read_metrics(tmp_path)[-1] == {"step": 3, "train/loss": None, "train/grad_norm": None}
    MetricsLog(tmp_path / "metrics.jsonl", 0).write({"step": 1})  # a new run
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("torn", ['{"step": 4, "train/lo', "[]\n", '{"loss": 1}\n', ""])
def test_a_resumed_log_keeps_complete_lines_up_to_its_step(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4)) + torn)
    MetricsLog(path, 3).write({"step": 4, "again": True})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("text", ["a\u2028b\x85c", "\ud800", "\r\n\x0b"])
def test_a_resumed_log_keeps_samples_of_any_characters(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2):
        log.write({"step": step, "sample": text})
    log.close()
    MetricsLog(path, 2).close()
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == [
        {"step": 1, "sample": text},
        {"step": 2, "sample": text},
    ]


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another --run-dir"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl", 0)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log._file = open("/dev/full", "w")  # noqa: SIM115, PTH123  a full disk
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: No space left on device; free space on that disk"):
        log.write({"step": 1})
    log.close()


def open_recorder(tracker, run_dir, resumed_step=0, **fields):
    """A recorder with a tracker alone."""
    tracking = TrackingConfig(tracker=tracker, **fields)
    return Recorder(None, lambda: make_tracker(tracking, run_dir, CONFIG, resumed_step))


def wandb_segment(run_dir, resumed_step, steps, model_file=None, **fields):
    """Record one segment of a run tracked by W&B."""
    run_dir.mkdir(exist_ok=True)
    recorder = open_recorder("wandb", run_dir, resumed_step, **fields)
    for step in steps:
        recorder.record({"step": step, "train/loss": 1.0 / step})
        if step % 2 == 0:
            recorder.record({"step": step, "val/stream/loss": 2.0 / step, "sample": "<b>thou</b>"})
    recorder.finish({"val/stream/loss": 0.5}, model_file, steps[-1])


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"weights")
    return path


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("train")]


def test_without_a_key_a_run_is_logged_offline(tmp_path, model_file, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wandb_segment(tmp_path / "run", 0, [1, 2, 3, 4], model_file)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert f"tracker   W&B ran offline; to upload: wandb sync {folder.relative_to(tmp_path)}" in caplog.messages
    assert warnings_in(caplog) == []
    run = read_run(folder)
    assert run["run"] | {"run_id": ""} == {
        "project": "charrnn", "run_group": "run", "display_name": "run", "run_id": "",
    }  # fmt: skip
    assert run["rows"] == [1, 2, 3, 4]
    assert [run["history"][s]["train/loss"] for s in (1, 2, 3, 4)] == [1.0, 0.5, 1 / 3, 0.25]
    assert run["history"][4]["val/stream/loss"] == 0.5
    assert run["config"]["train"] == {"seed": 5}
    assert run["summary"]["best/val/stream/loss"] == 0.5
    (artifact,) = run["artifacts"]
    assert (artifact.name, artifact.type) == ("run-model", "model")
    assert {"best", "step-4"} <= set(artifact.aliases)
    assert json.loads(artifact.metadata) == {"val/stream/loss": 0.5}
    assert run["metrics"] == {"*": "step"}
    assert [run["history"][s]["step"] for s in run["rows"]] == [1, 2, 3, 4]
    assert run["exit_code"] == 0
    (page,) = folder.rglob("sample_4_*.html")
    assert "&lt;b&gt;thou&lt;/b&gt;" in page.read_text()


@pytest.mark.parametrize(("artifact", "names"), [(True, ["King-Lear-1-model"]), (False, [])])
def test_the_artifact_is_optional_and_its_name_legal(tmp_path, model_file, caplog, artifact, names):
    fields = {"name": "King Lear/1", "group": "plays & more", "artifact": artifact}
    wandb_segment(tmp_path / "run", 0, [1], model_file, **fields)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run = read_run(folder)
    assert (run["run"]["display_name"], run["run"]["run_group"]) == ("King Lear/1", "plays & more")
    assert [a.name for a in run["artifacts"]] == names
    assert warnings_in(caplog) == []


def test_a_run_that_ends_early_is_marked_as_failed(tmp_path):
    recorder = open_recorder("wandb", tmp_path)
    recorder.record({"step": 1, "train/loss": 1.0})
    recorder.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read_run(folder)["exit_code"] == 1


def test_the_users_wandb_mode_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb_segment(tmp_path / "run", 0, [1])
    assert not list((tmp_path / "run").rglob("*.wandb"))


OPEN_AND_FINISH = """
import sys
from pathlib import Path
from accelerate import PartialState
from charrnn.log import configure_logging
from charrnn.config import TrackingConfig
from train.tracking.recorder import Recorder, make_tracker
PartialState(cpu=True)
configure_logging()
recorder = Recorder(None, lambda: make_tracker(TrackingConfig(tracker="wandb"), Path(sys.argv[1]), {}, 0))
recorder.record({"step": 1, "train/loss": 1.0})
recorder.finish({}, None, 1)
"""


def run_alone(run_dir, **environment):
    """The same in a process of its own, on a terminal, where W&B would prompt for a key; returns its output."""
    import pty

    terminal, far_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_FINISH, str(run_dir)],
        stdin=far_end, stdout=far_end, stderr=far_end,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(far_end)
    written = b""
    try:
        while chunk := os.read(terminal, 4096):
            written += chunk
    except OSError:  # how Linux reports that the far end has been closed
        pass
    finally:
        os.close(terminal)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_without_a_key_is_not_prompted_for_one(tmp_path):
    written = run_alone(tmp_path, WANDB_MODE="online")
    assert written.count("logging offline instead") == 1
    assert "wandb login" in written
    assert "Enter your choice" not in written
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert "wandb sync" in written


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_with_an_unreachable_server_the_run_is_kept_offline(tmp_path):
    unreachable = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    written = run_alone(tmp_path, **unreachable)
    assert written.count("logging offline instead") == 1
    assert "wandb sync" in written
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read_run(folder)["rows"] == [1]


class OnlineRun:
    """Stands in for Accelerate's tracker of a machine that is logged in; keeps how each segment was opened."""

    opened = ()

    def __init__(self, project, **options):
        self.opened.append(options)
        self.id = options["id"] or f"id{len(self.opened)}"
        self.tracker, self.summary = self, {}
        self.url, self.offline, self.dir = f"https://there/{self.id}", False, "RUN/files"

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_online_a_resumed_run_keeps_its_id(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(OnlineRun, "opened", [])
    monkeypatch.setattr("train.tracking.wandb_tracker.AccelerateTracker", OnlineRun)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    for resumed_step in (0, 5, 0):
        wandb_segment(tmp_path, resumed_step, [resumed_step + 1], name="owl")
    assert [(o["mode"], o["id"], o["resume"]) for o in OnlineRun.opened] == [
        ("online", None, None),
        ("online", "id1", "allow"),
        ("online", None, None),
    ]
    lines = [m for m in caplog.messages if m.startswith("tracker ")]
    assert lines == [f"tracker   https://there/{name}" for name in ("id1", "id1", "id1", "id1", "id3", "id3")]
    assert warnings_in(caplog) == []


class FakeTracker:
    """A tracker whose chosen method raises."""

    def __init__(self, failing):
        self.failing, self.calls = failing, []

    def __getattr__(self, name):
        def call(*_):
            self.calls.append(name)
            if name == self.failing:
                raise ConnectionError("no\nroute")
            return "line"

        return call


@pytest.mark.parametrize("method", ["log", "finish", "abandon", "none"])
def test_a_tracker_that_fails_is_reported_once_and_dropped(method, caplog):
    tracker = FakeTracker(method)
    recorder = Recorder(None, lambda: tracker)
    for step in (1, 2):
        recorder.record({"step": step, "train/loss": 1.0})
    recorder.close() if method == "abandon" else recorder.finish({}, None, 2)
    recorder.record({"step": 3})
    recorder.close()
    if method == "none":
        assert tracker.calls == ["log", "log", "finish"]
        assert caplog.messages == ["tracker   line"]
        return
    (warning,) = warnings_in(caplog)
    assert "tracker failed (ConnectionError: no route); training continues without it" in warning
    assert tracker.calls.count(method) == 1


def test_a_tracker_that_is_not_installed_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.delitem(sys.modules, "train.tracking.wandb_tracker", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    recorder = open_recorder("wandb", tmp_path)
    recorder.record({"step": 1, "train/loss": 1.0})
    recorder.finish({}, None, 1)
    (warning,) = warnings_in(caplog)
    assert "tracker failed (wandb is not installed: pip install wandb); training continues without it" in warning


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return events, [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")]


def test_tensorboard_files_hold_every_metric(tmp_path, caplog):
    recorder = open_recorder("tensorboard", tmp_path)
    for step in (1, 2):
        recorder.record({"step": step, "train/loss": 1.0 / step})
    recorder.record({"step": 3, "train/loss": 1 / 3, "sample": "To be"})
    recorder.finish({}, None, 3)
    assert caplog.messages[-1] == f"tracker   tensorboard --logdir {tmp_path / 'tensorboard'}"
    events, losses = scalars(tmp_path / "tensorboard")
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert b"To be" in events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]
    assert b'"seed": 5' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    for resumed_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        recorder = open_recorder("tensorboard", tmp_path, resumed_step)
        for step in steps:
            recorder.record({"step": step, "train/loss": float(step)})
        recorder.close()
    assert [step for step, _ in scalars(tmp_path / "tensorboard")[1]] == [1, 2, 3, 4]


def test_without_a_tracker_nothing_is_written(tmp_path):
    recorder = open_recorder("none", tmp_path)
    recorder.record({"step": 1, "train/loss": 1.0})
    recorder.finish({}, None, 1)
    assert not list(tmp_path.iterdir())
