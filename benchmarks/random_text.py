"""The product's trainer on random text, for programs that time its steps: nothing is learnt, nothing is fetched."""

from pathlib import Path
from typing import Any

import numpy as np

from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import prepare
from train.checkpoint.vocab_transfer import StartingPoint
from train.distributed.setup import make_accelerator, set_threads
from train.tracking.recorder import Recorder
from train.trainer import Trainer

BATCHES_OF_TEXT = 64


def config_options(folder: Path, size: dict[str, Any]) -> dict[str, Any]:
    """The options of a run of one process in `folder`. size: rnn, hidden_dim, num_layers, seq_len, rows and more."""
    return {
        "data.source": str(folder / "random.txt"),
        "data.cache_dir": str(folder / "data"),
        "data.batch_size": size["rows"],
        "data.seq_len": size["seq_len"],
        "model.rnn": size["rnn"],
        "model.hidden_dim": size["hidden_dim"],
        "model.num_layers": size["num_layers"],
        "train.epochs": 0,
        "train.max_steps": 10**9,
        "train.threads": 1,
        "train.mixed_precision": "no",
        "train.run_dir": str(folder / "run"),
    }


def write_text(config: RunConfig, processes: int = 1) -> None:
    """Random printable ASCII, enough for many batches of all processes; prepared before anybody asks for it."""
    data = config.data
    chars = BATCHES_OF_TEXT * (processes * data.batch_size + 1) * data.seq_len
    text = np.random.default_rng(0).integers(ord(" "), ord("~") + 1, chars, np.uint8)
    Path(data.source).write_bytes(text.tobytes())
    prepare(data)


def make_trainer(options: dict[str, Any]) -> Trainer:
    """A trainer of `write_text`'s text, in this process."""
    config = load_config(None, options)
    set_threads(config.train.threads)
    corpus, accelerator = prepare(config.data), make_accelerator(config.train)
    run_dir = Path(config.train.run_dir)
    return Trainer(config, corpus, StartingPoint(corpus.vocab), accelerator, run_dir, Recorder())
