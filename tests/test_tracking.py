"""The local record, and trackers that may fail without harm."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from wandb_log import nobody_logged_in, read_run

from charrnn.config import TrackingConfig
from charrnn.errors import CheckpointError
from train.tracking.metrics_log import MetricsLog, Tracker, open_tracker

CONFIG = {"data": {"batch_size": 8}, "train": {"seed": 5}}


@pytest.fixture(autouse=True)
def _no_key_anywhere(monkeypatch, tmp_path_factory):
    with nobody_logged_in(monkeypatch, tmp_path_factory.mktemp("home")):
        yield


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
    assert (artifact.name, artifact.type) == ("run-model", "model")
    assert {"best", "step-4"} <= set(artifact.aliases)
    assert json.loads(artifact.metadata) == {"val/stream/loss": 0.5}
    assert told["metrics"] == {"*": "step"}
    assert [told["history"][s]["step"] for s in told["rows"]] == [1, 2, 3, 4]
    assert told["exit_code"] == 0
    (page,) = folder.rglob("sample_4_*.html")
    assert "&lt;b&gt;thou&lt;/b&gt;" in page.read_text()
    assert "warning" not in capfd.readouterr().err.lower()


def test_a_name_of_any_characters_is_good_enough_for_the_artifact(tmp_path, capfd):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"weights")
    wandb_segment(tmp_path / "run", 0, [1], model, name="King Lear/1", group="plays & more")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    told = read_run(folder)
    assert (told["run"]["display_name"], told["run"]["run_group"]) == ("King Lear/1", "plays & more")
    assert [a.name for a in told["artifacts"]] == ["King-Lear-1-model"]
    assert "warning" not in capfd.readouterr().err.lower()


def test_without_a_wish_for_one_no_artifact_is_made(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"weights")
    wandb_segment(tmp_path / "run", 0, [1], model, artifact=False)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert read_run(folder)["artifacts"] == []


def test_a_run_that_ends_early_is_marked_as_failed(tmp_path):
    tracker = open_tracker(TrackingConfig(tracker="wandb"), tmp_path, CONFIG, 0)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read_run(folder)["exit_code"] == 1


def test_closing_a_finished_tracker_changes_nothing(tmp_path):
    backend = Failing("abandon")
    tracker = Tracker("wandb", lambda: backend)
    assert tracker.finish({}, None, 1) == ["line"]
    tracker.close()
    assert backend.calls == ["finish"]


def test_offline_segments_are_runs_of_one_group(tmp_path):
    run_dir = tmp_path / "owl"
    wandb_segment(run_dir, 0, [1, 2], name="night", group="owls")
    (line,) = wandb_segment(run_dir, 2, [3, 4], name="night", group="owls")
    assert line.endswith(f"wandb sync {run_dir / 'wandb'}/offline-run-*")
    told = sorted((read_run(f) for f in (run_dir / "wandb").glob("offline-run-*")), key=lambda t: t["rows"])
    assert [t["run"]["display_name"] for t in told] == ["night", "night-from-2"]
    assert {t["run"]["run_group"] for t in told} == {"owls"}
    assert [t["rows"] for t in told] == [[1, 2], [3, 4]]
    assert [t["config"]["resumed_step"] for t in told] == [0, 2]


def test_the_users_wandb_mode_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb_segment(tmp_path / "run", 0, [1])
    assert not list((tmp_path / "run").rglob("*.wandb"))


OPEN_AND_FINISH = """
import sys
from pathlib import Path
from accelerate import PartialState
from charrnn.config import TrackingConfig
from train.tracking.metrics_log import open_tracker
PartialState(cpu=True)
tracker = open_tracker(TrackingConfig(tracker="wandb"), Path(sys.argv[1]), {}, 0)
tracker.log({"train/loss": 1.0}, 1)
print(*tracker.finish({}, None, 1))
"""


def run_alone(run_dir, **environment):
    """The same in a process of its own, whose terminal would have W&B ask for a key; returns all that it wrote."""
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
    except OSError:  # Linux says so when the far end has been closed
        pass
    finally:
        os.close(terminal)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_without_a_key_is_not_asked_for_one_even_when_online_is_wanted(tmp_path):
    written = run_alone(tmp_path, WANDB_MODE="online")
    assert written.count("logging offline instead") == 1
    assert "wandb login" in written
    assert "Enter your choice" not in written
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert "wandb sync" in written


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_with_a_key_and_no_way_to_the_server_the_run_is_kept_offline(tmp_path):
    unreachable = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    written = run_alone(tmp_path, **unreachable)
    assert written.count("logging offline instead") == 1
    assert "wandb sync" in written
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read_run(folder)["rows"] == [1]


class OnlineRun:
    """Stands in for Accelerate's tracker of a machine that is logged in; notes how each segment was opened."""

    opened = ()

    def __init__(self, project, **options):
        self.opened.append(options)
        self.id = options["id"] or f"id{len(self.opened)}"
        self.tracker, self.summary = self, {}
        self.url, self.offline, self.dir = f"https://there/{self.id}", False, "RUN/files"

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_online_a_resumed_run_goes_on_under_its_id_and_a_new_one_does_not(tmp_path, monkeypatch, capsys):
    import accelerate.tracking

    monkeypatch.setattr(OnlineRun, "opened", [])
    monkeypatch.setattr(accelerate.tracking, "WandBTracker", OnlineRun)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    lines = [wandb_segment(tmp_path, resumed_step, [resumed_step + 1], name="owl") for resumed_step in (0, 5, 0)]
    assert [(o["mode"], o["id"], o["resume"]) for o in OnlineRun.opened] == [
        ("online", None, None),
        ("online", "id1", "allow"),
        ("online", None, None),
    ]
    assert lines == [["tracker   https://there/id1"], ["tracker   https://there/id1"], ["tracker   https://there/id3"]]
    assert "warning" not in capsys.readouterr().err


class Failing:
    """A backend whose chosen method raises."""

    def __init__(self, method):
        self.method, self.calls = method, []

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
    opened.log({"train/loss": 1.0}, 1)
    assert opened.finish({}, None, 1) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tracker wandb failed (it is not installed); training goes on without it" in error


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
    assert b'"seed": 5' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        opened = open_tracker(TrackingConfig(tracker="tensorboard"), tmp_path, CONFIG, resumed_step)
        for step in steps:
            opened.log({"train/loss": float(step)}, step)
        opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_no_tracker_imports_none(tmp_path):
    opened = open_tracker(TrackingConfig(tracker="none"), tmp_path, CONFIG, 0)
    opened.log({"train/loss": 1.0}, 1)
    assert opened.finish({}, None, 1) == []
    assert not list(tmp_path.iterdir())
    program = "import sys, train.tracking.metrics_log; assert not {'wandb', 'tensorboard', 'torch'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)
