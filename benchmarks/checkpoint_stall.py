"""What a checkpoint costs training: the copy in memory, and what the writing behind it takes from the steps.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --rnn GRU --hidden-dim 512 --rows 32 --seq-len 64

The trainer's own steps and its own `save` (a whole step checkpoint: weights, optimizer, state, fsync) in one process,
with the machine's cores. In a round, `--steps` steps are timed without a checkpoint, then as many with one begun before
the first of them, then as many after one that is waited for. From each round come, in shares of that round's median
plain step:

    snapshot   the copy to host memory, for which training stands still
    stall      what the steps beside the writing took longer than plain ones, all of them together
    waited     what training would lose if it waited for the disk

Medians and quartiles over rounds are printed.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator

from charrnn.config import RunConfig, load_config
from charrnn.corpus import prepare
from train.main import Cell
from train.processes import make_accelerator, set_threads
from train.recorder import Recorder
from train.report import device_name
from train.resume import StartingPoint
from train.state import capture
from train.trainer import Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rnn: Annotated[Cell, typer.Option(case_sensitive=False, help="Recurrent cell.")] = Cell.LSTM,
    hidden_dim: Annotated[int, typer.Option(help="H.")] = 1024,
    num_layers: Annotated[int, typer.Option(help="L.")] = 2,
    rows: Annotated[int, typer.Option(help="B.")] = 128,
    seq_len: Annotated[int, typer.Option(help="T.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of a case in a round.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    precision: Annotated[str, typer.Option(help="no, bf16 or native.")] = "no",
) -> None:
    """Measures what checkpoints cost training."""
    with tempfile.TemporaryDirectory(prefix="charrnn-", dir=".") as folder:
        trainer = make_trainer(Path(folder), rnn.value, hidden_dim, num_layers, rows, seq_len, precision)
        seconds(trainer.train_step)  # the first finds cold caches
        size = sum(t.nbytes for t in [*capture(trainer, whole=True).optimizer.values(), *trainer.model.parameters()])
        print(
            f"{device_name(trainer.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; {rnn.value} "
            f"{num_layers} x {hidden_dim}, {rows} x {seq_len} characters a step, precision "
            f"{trainer.accelerator.mixed_precision}; a checkpoint of {size / 2**20:.0f} MiB"
        )
        figures = [one_round(trainer, steps) for _ in range(rounds)]
    print(f"{'':<12}{'median':>10}{'quartiles':>24}")
    for name in figures[0]:
        values = [f[name] for f in figures]
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        unit = " s" if name == "step" else " %"
        scale = 1 if unit == " s" else 100
        median = statistics.median(values)
        print(f"{name:<12}{scale * median:>8.2f}{unit}{scale * low:>14.2f} to {scale * high:.2f}{unit}")


def make_trainer(
    folder: Path, rnn: str, hidden_dim: int, num_layers: int, rows: int, seq_len: int, precision: str
) -> Trainer:
    """A trainer of the product, on random text of its own in `folder`."""
    text = folder / "random.txt"
    letters = np.random.default_rng(0).integers(32, 97, rows * seq_len * 4 + seq_len, np.uint8)
    text.write_bytes(letters.tobytes())
    settings = {
        "data.source": str(text),
        "data.cache_dir": str(folder / "data"),
        "data.batch_size": rows,
        "data.seq_len": seq_len,
        "model.rnn": rnn,
        "model.hidden_dim": hidden_dim,
        "model.num_layers": num_layers,
        "train.mixed_precision": precision,
        "train.run_dir": str(folder / "run"),
    }
    config: RunConfig = load_config(None, settings)
    set_threads(0)
    accelerator: Accelerator = make_accelerator(config.train)
    corpus = prepare(config.data)
    run_dir = folder / "run"
    return Trainer(config, corpus, StartingPoint(corpus.vocab), accelerator, run_dir, Recorder.null())


def one_round(trainer: Trainer, steps: int) -> dict[str, float]:
    """The figures of one round; see the module."""
    plain = [seconds(trainer.train_step) for _ in range(steps)]
    step = statistics.median(plain)
    saver = trainer.saver
    assert saver is not None

    snapshot = seconds(lambda: trainer.save(step=True))
    beside = [seconds(trainer.train_step) for _ in range(steps)]
    saver.wait()

    def saved_and_waited_for() -> None:
        trainer.save(step=True)
        saver.wait()

    waited = seconds(saved_and_waited_for)
    return {
        "step": step,
        "snapshot": snapshot / step,
        "stall": (sum(beside) - steps * step) / step,
        "waited": waited / step,
    }


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    app()
