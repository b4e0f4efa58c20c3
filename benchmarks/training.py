"""The product's trainer for benchmarks: the one place that knows how it is built, stepped and started as a command."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState, GradientState

from benchmarks.common import ROOT
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import prepare
from train.checkpoint.resume import starting_point
from train.distributed.setup import make_accelerator, set_threads
from train.loop.trainer import Trainer
from train.tracking.recorder import Recorder

_BATCHES_OF_TEXT = 64


def options_of(folder: Path, **size: Any) -> dict[str, Any]:
    """Returns config options of a run of one process and one thread in `folder`, on `write_random_text`'s text.

    Args:
        folder: Where text, ids and run go.
        size: rnn, hidden_dim, num_layers, seq_len, batch_size.
    """
    return {
        "data.source": str(folder / "random.txt"),
        "data.cache_dir": str(folder / "data"),
        "train.epochs": 0,
        "train.max_steps": 10**9,
        "train.threads": 1,
        "train.mixed_precision": "no",
        "train.run_dir": str(folder / "run"),
        **{f"{'data' if name in ('batch_size', 'seq_len') else 'model'}.{name}": n for name, n in size.items()},
    }


def write_random_text(options: dict[str, Any]) -> RunConfig:
    """Writes and prepares random printable ASCII, enough for many batches; returns the config."""
    config = load_config(None, options)
    chars = _BATCHES_OF_TEXT * (config.data.batch_size + 1) * config.data.seq_len
    text = np.random.default_rng(0).integers(ord(" "), ord("~") + 1, chars, np.uint8)
    Path(config.data.source).write_bytes(text.tobytes())
    prepare(config.data)
    return config


def reset_accelerator() -> None:
    """Has the next Accelerator of this process take settings of its own: they are singletons."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_trainer(
    config: RunConfig, recorder: Recorder | None = None, clock: Callable[[], float] = time.monotonic
) -> Trainer:
    """Builds a trainer in this process, which resumes what its run folder holds.

    Args:
        config: What to train.
        recorder: Of its metrics; without, nothing is recorded.
        clock: Seconds.
    """
    reset_accelerator()
    set_threads(config.train.threads)
    corpus, accelerator, run_dir = prepare(config.data), make_accelerator(config.train), Path(config.train.run_dir)
    start = starting_point(config, corpus, run_dir, resume=True)
    return Trainer(config, corpus, start, accelerator, run_dir, recorder or Recorder(), clock)


def assigned(fields: Mapping[str, object]) -> list[str]:
    """Returns the command line's options for config fields, each "section.key"."""
    return [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


def run_training(name: str, run_dir: Path, *options: object) -> dict[str, Any]:
    """Trains by the command line.

    Args:
        name: Of the run, for errors.
        run_dir: Its folder.
        options: Of train/main.py, besides --run-dir.

    Returns:
        The last value of each metric, and `seconds` from start to end.

    Raises:
        RuntimeError: With the last line of its messages when it fails.
    """
    command = ["-m", "accelerate.commands.launch", "train/main.py", "--run-dir", run_dir, *options]
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return last_metrics(run_dir) | {"seconds": time.perf_counter() - began}


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """Returns the last value of each metric."""
    return {name: value for record in read_metrics(run_dir) for name, value in record.items()}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
