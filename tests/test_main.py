"""The command line of training, as a user types it, and what a whole run leaves behind."""

import math
import os
import re
import signal

import pytest
from launches import ROOT, prepare_small_run, python
from training import fresh_accelerator, refused, stopping_after
from typer.testing import CliRunner

from benchmarks.training import read_metrics
from charrnn.config import load_config
from charrnn.errors import PreemptedError, RunStoppedError
from infer.engine import Engine
from train import main as command
from train.checkpoint.format import load_newest
from train.distributed.setup import set_threads
from train.run import run


@pytest.fixture
def folder(tmp_path):
    prepare_small_run(tmp_path)
    return tmp_path


def accelerate(folder, *arguments):
    """`accelerate launch train/main.py`, from `folder`."""
    return python("-m", "accelerate.commands.launch", ROOT / "train" / "main.py", *arguments, folder=folder)


def test_a_launched_run_is_complete_and_resumes(folder):
    arguments = ("--config", "small.yaml", "--data", "words.txt", "--rnn", "LSTM", "--set", "model.num_layers=1")
    arguments += ("--set", "log.every=2")
    done = accelerate(folder, *arguments)
    assert done.returncode == 0, done.stderr
    run_dir = folder / "checkpoints" / "small-words"
    for name in ("config.yaml", "metrics.jsonl", "best", "step-00000012", "step-00000010", "model.onnx"):
        assert (run_dir / name).exists(), name
    assert not (run_dir / "step-00000005").exists()
    for part in ("device", "1 process(es) x", "parameters", "vocabulary of", "12 steps", " left", "infer generate -m"):
        assert part in done.stderr, part

    config = load_config(run_dir / "config.yaml", {})
    assert (config.model.rnn, config.model.num_layers, config.data.source) == ("LSTM", 1, "words.txt")
    records = read_metrics(run_dir)
    assert [r["step"] for r in records if "train/loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "val/windows/bpc" in r] == [6, 12]
    for record in records:
        assert {"step", "time_s", "chars"} <= record.keys()
        assert record["chars"] == record["step"] * 8 * 16
        for name in ("train", "val/stream", "val/windows"):
            if f"{name}/loss" in record:
                assert record[f"{name}/bpc"] == pytest.approx(record[f"{name}/loss"] / math.log(2))
    assert len("".join(Engine(run_dir / "model.onnx").generate("the ", length=30))) == 30

    longer = accelerate(folder, *arguments, "--max-steps", "14")
    assert longer.returncode == 0, longer.stderr
    assert "resumed at step 12" in longer.stderr
    assert [r["step"] for r in read_metrics(run_dir) if "train/loss" in r] == [2, 4, 6, 8, 10, 12, 14]

    assert "--resume never does not overwrite it" in refused(folder, *arguments, "--resume", "never")


def test_every_option_is_explained_and_shows_its_default():
    shown = re.sub(r"[│\s]+", " ", CliRunner().invoke(command.app, ["--help"], env={"COLUMNS": "200"}).output)
    for option in (
        "--config", "--data", "--rnn", "--epochs", "--max-steps", "--time-limit", "--run-dir", "--seed", "--resume",
        "--init-from", "--vocab", "--tracker", "--data-mirror", "--set",
    ):  # fmt: skip
        assert option in shown
    for default in ("shakespeare", "(GRU)", "configs/plain.yaml", "checkpoints/[<config>-]<corpus>", "auto"):
        assert default in shown


def test_all_invalid_options_are_one_line_before_any_file(folder):
    line = refused(folder, "--config", "small.yaml", "--epochs", "-1", "--set", "modle.rnn=GRU", "--time-limit", "soon")
    for part in ("train.epochs = -1", "modle (nearest: model)", "not a duration"):
        assert part in line
    assert sorted(p.name for p in folder.iterdir()) == ["small.yaml", "words.txt"]


def test_a_user_error_ends_the_process_with_one_line(folder):
    done = python(ROOT / "train" / "main.py", "--data", "absent.txt", folder=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "absent.txt" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "clause"),
    [
        (("--config", "absent.yaml"), "no config file"),
        (("--data", "absent.txt"), "absent.txt"),
        (("--data", "shakespear"), "shakespeare"),
        (("--data", "words.txt", "--set", "data.batch_size=100000"), "would fit"),
        (
            ("--config", "small.yaml", "--data", "words.txt", "--set", "train.accumulation_steps=3"),
            "set it to 6 or 9",
        ),
        (("--data", "words.txt", "--set", "train.mixed_precision=fp16"), "precision fp16"),
        (("--config", "small.yaml", "--data", "words.txt", "--init-from", "nowhere"), "nowhere"),
        (("--config", "small.yaml", "--data", "words.txt", "--run-dir", "words.txt"), "choose another --run-dir"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(folder, arguments, clause):
    assert clause in refused(folder, *arguments)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("number", "error", "exit_code"),
    [("SIGINT", RunStoppedError, 130), ("SIGTERM", PreemptedError, 75), ("SIGUSR1", PreemptedError, 75)],
)
def test_a_stop_signal_writes_a_checkpoint_to_resume_from(folder, monkeypatch, capsys, number, error, exit_code):
    monkeypatch.chdir(folder)
    fresh_accelerator()
    config = load_config(folder / "small.yaml", {"data.source": "words.txt", "log.every": 2})
    stopped = rf"^stopped by {number} after step 7; rerun the same command to resume from step 7$"
    with monkeypatch.context() as patch:
        stopping_after(patch, 7, signal.Signals[number])
        with pytest.raises(error, match=stopped) as caught:
            run(config, config_name="small", resume=True)
    assert caught.value.exit_code == exit_code
    assert f"{number} received: stopping after this step and its checkpoint" in capsys.readouterr().err
    run_dir = folder / "checkpoints" / "small-words"
    assert load_newest(run_dir).step == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    assert run(config, config_name="small", resume=True).exists()
    assert [r["step"] for r in read_metrics(run_dir) if "train/loss" in r] == [2, 4, 6, 7, 8, 10, 12]


def test_all_cores_are_used_whatever_the_launcher_set(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert set_threads(0) == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert set_threads(0) == 1
    assert set_threads(3) == 3
