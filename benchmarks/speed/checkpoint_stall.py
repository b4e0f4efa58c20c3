"""What a checkpoint costs training: the copy in memory, and what the writing behind it takes from the steps.

    python -m benchmarks.speed.checkpoint_stall
    python -m benchmarks.speed.checkpoint_stall --rnn GRU --hidden-dim 512 --rows 32 --seq-len 64

The trainer's own steps and its own `save` (a whole step checkpoint: weights, optimizer, state, fsync) in one process,
with the machine's cores. In a round, `--steps` steps are timed without a checkpoint, then as many with one begun before
the first of them, and then a checkpoint that is waited for. From each round come, in shares of its median plain step:

    snapshot   the copy to host memory, for which training stands still
    stall      what the steps beside the writing took longer than plain ones, all of them together
    waited     what training would lose if it waited for the disk

Medians and quartiles over rounds are printed.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks.random_text import config_options, make_trainer, write_text
from charrnn.config import load_config
from train.distributed.setup import device_name
from train.state import capture
from train.trainer import Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rnn: Annotated[Literal["GRU", "LSTM"], typer.Option(help="Recurrent cell.")] = "LSTM",
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
        size = {"rnn": rnn, "hidden_dim": hidden_dim, "num_layers": num_layers, "rows": rows, "seq_len": seq_len}
        options = {**config_options(Path(folder), size), "train.threads": 0, "train.mixed_precision": precision}
        write_text(load_config(None, options))
        trainer = make_trainer(options)
        seconds(trainer.train_step)  # the first finds cold caches
        size_bytes = sum(
            t.nbytes for t in [*capture(trainer, whole=True).optimizer.values(), *trainer.model.parameters()]
        )
        print(
            f"{device_name(trainer.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; {rnn} "
            f"{num_layers} x {hidden_dim}, {rows} x {seq_len} characters a step, precision "
            f"{trainer.accelerator.mixed_precision}; a checkpoint of {size_bytes / 2**20:.0f} MiB"
        )
        figures = [one_round(trainer, steps) for _ in range(rounds)]
    print(f"{'':<12}{'median':>10}{'quartiles':>24}")
    for name in figures[0]:
        values = [f[name] for f in figures]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        unit = " s" if name == "step" else " %"
        scale = 1 if unit == " s" else 100
        median = statistics.median(values)
        print(f"{name:<12}{scale * median:>8.2f}{unit}{scale * low:>14.2f} to {scale * high:.2f}{unit}")


def one_round(trainer: Trainer, steps: int) -> dict[str, float]:
    """The figures of one round; see the module."""
    plain = [seconds(trainer.train_step) for _ in range(steps)]
    step = statistics.median(plain)

    snapshot = seconds(lambda: trainer.save(step=True))
    beside = [seconds(trainer.train_step) for _ in range(steps)]
    trainer.writer.wait()

    def saved_and_waited_for() -> None:
        trainer.save(step=True)
        trainer.writer.wait()

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
    app()
