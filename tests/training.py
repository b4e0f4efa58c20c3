"""Small training runs in this process, for the tests of the trainer."""

import contextlib
import io
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from accelerate import Accelerator
from numpy.typing import ArrayLike

from benchmarks.training import reset_accelerator
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import prepare
from train import main as command
from train.checkpoint.resume import starting_point
from train.distributed.collectives import Collectives
from train.distributed.setup import make_accelerator
from train.distributed.signals import StopSignals
from train.loop.control import Control
from train.loop.trainer import Trainer
from train.tracking.recorder import Recorder


def fresh_accelerator(**options: Any) -> Accelerator:
    """An Accelerator on the CPU; its singletons would otherwise keep the settings of the test before."""
    reset_accelerator()
    return Accelerator(cpu=True, **options)


def some_text(num_chars: int = 6000, seed: int = 0) -> str:
    """Words in a loose order: learnable, and not by heart at once."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "two", "owls", "watch\n"]
    draw = random.Random(seed)
    return " ".join(draw.choice(words) for _ in range(num_chars // 4))[:num_chars]


def tiny_config(folder: Path, assignments: Sequence[str] = (), text: str | None = None) -> RunConfig:
    """A run of seconds on a text of its own."""
    path = folder / "words.txt"
    if not path.exists():
        path.write_text(some_text() if text is None else text, encoding="utf-8")
    small = {
        "data.source": str(path),
        "data.cache_dir": str(folder / "data"),
        "data.batch_size": 8,
        "data.seq_len": 16,
        "model.embedding_dim": 8,
        "model.hidden_dim": 16,
        "optim.warmup_steps": 2,
        "train.epochs": 0,
        "train.max_steps": 12,
        "train.run_dir": str(folder / "run"),
        "eval.every": 4,
        "eval.stream_lanes": 4,
        "eval.stream_warmup": 32,
        "log.every": 1,
        "checkpoint.every": 5,
        "sample.length": 20,
    }
    return load_config(None, small, assignments)


@contextlib.contextmanager
def logged(level: int = logging.INFO) -> Iterator[list[str]]:
    """The messages that training logs inside the block, from `level` on."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("train")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class ListRecorder(Recorder):
    """Keeps what is recorded; raises `at` once a record of step `stop_at` comes, as a killed process would end."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def record(self, values: dict[str, Any]) -> None:
        if values["step"] == self.stop_at:
            raise KeyboardInterrupt
        self.records.append(values)

    def losses(self) -> dict[int, float]:
        """step -> train/loss."""
        return {r["step"]: r["train/loss"] for r in self.records if "train/loss" in r}


def stopping_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Has every trainer be sent signal `number` when it has made update `step`."""
    original = Trainer.train_step

    def stopped(trainer: Trainer) -> None:
        original(trainer)
        if trainer.progress.step == step:
            signal.raise_signal(number)
            while not trainer.control.signals.received:  # a thread notes it
                time.sleep(0.001)

    monkeypatch.setattr(Trainer, "train_step", stopped)


def make_trainer(config: RunConfig, recorder: Recorder | None = None, **options: Any) -> Trainer:
    """A trainer that starts where the config's run folder says."""
    if init_from := options.pop("init_from", None):
        config = config.model_copy(update={"train": config.train.model_copy(update={"init_from": str(init_from)})})
    accelerator = options.pop("accelerator", None) or fresh_accelerator()
    signals, heartbeat = options.pop("signals", StopSignals()), options.pop("heartbeat", lambda *_: None)
    options["control"] = Control(Collectives(accelerator), signals, heartbeat)
    corpus = prepare(config.data)
    run_dir = Path(config.train.run_dir)
    start = starting_point(config, corpus, run_dir, resume=True)
    return Trainer(config, corpus, start, accelerator, run_dir, recorder or ListRecorder(), **options)


def interrupted_and_resumed(config: RunConfig, *, stop_at: int, resumes_at: int) -> Trainer:
    """The trainer of a run that was interrupted at a step, and that another trainer then completed."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer(config, ListRecorder(stop_at=stop_at)).fit()
    resumed = make_trainer(config)
    assert resumed.progress.step == resumes_at
    resumed.fit()
    return resumed


def make_rank(config: RunConfig, recorder: Recorder | None = None, **options: Any) -> Trainer:
    """A trainer on the accelerator that a real run gets, with its settings of DDP."""
    return make_trainer(config, recorder, accelerator=make_accelerator(config.train), **options)


def largest_difference(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The largest relative difference between two curves of finite values."""
    ours, theirs = np.array(ours), np.array(theirs)
    assert ours.shape == theirs.shape
    assert ours.size
    assert np.isfinite([ours, theirs]).all()
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


def refused(folder: Path, *arguments: object) -> str:
    """The one line that train/main.py's `main` prints when it refuses, here in this process."""
    reset_accelerator()
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", ["main.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        command.main()
    assert end.value.code == 2, err.getvalue()
    assert out.getvalue() == ""
    assert err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue()
