"""What a checkpoint costs training: the snapshot in memory, and the slowdown of the steps while it is written.

    python -m benchmarks.speed.checkpoint_stall [--rnn GRU --hidden-dim 512 --rows 32 --seq-len 64]

The trainer's own steps and its own `save` (a complete step checkpoint: weights, optimizer, state, fsync) in one
process, on all cores. In a round, `--steps` steps are timed without a checkpoint, then as many with one begun before
the first of them, and then a checkpoint that is waited for. From each round come, as shares of its median plain step:

    snapshot   the copy to host memory, for which training stands still
    stall      what the steps beside the writing took longer than plain ones, all of them together
    waited     what training would lose if it waited for the disk

Medians and quartiles over rounds are printed.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import (
    Cell,
    HiddenDim,
    NumLayers,
    Rnn,
    SeqLen,
    columns,
    in_turns,
    machine_line,
    quartiles,
    run,
    seconds_of,
)
from benchmarks.training import make_trainer, options_of, write_random_text
from train.checkpoint.format import step_folders
from train.loop.trainer import Trainer


def main(
    rnn: Rnn = Cell.LSTM,
    hidden_dim: HiddenDim = 1024,
    num_layers: NumLayers = 2,
    rows: Annotated[int, typer.Option(help="B.")] = 128,
    seq_len: SeqLen = 128,
    steps: Annotated[int, typer.Option(help="Steps of a case in a round.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    precision: Annotated[str, typer.Option(help="no, bf16 or native.")] = "no",
) -> None:
    """Measure what checkpoints cost training."""
    size = {"rnn": rnn, "hidden_dim": hidden_dim, "num_layers": num_layers, "batch_size": rows}
    with tempfile.TemporaryDirectory(prefix="charrnn-", dir=".") as folder:
        options = options_of(Path(folder), **size, seq_len=seq_len)
        trainer = make_trainer(write_random_text(options | {"train.threads": 0, "train.mixed_precision": precision}))
        trainer.train_step()  # the first finds cold caches
        taken = in_turns({"round": lambda: one_round(trainer, steps)}, rounds)["round"]
        size_bytes = sum(file.stat().st_size for file in step_folders(trainer.checkpoints.run_dir)[0].iterdir())
    print(machine_line())
    print(
        f"size     {rnn} {num_layers} x {hidden_dim}, {rows} x {seq_len} characters a step, precision "
        f"{trainer.accelerator.mixed_precision}, {torch.get_num_threads()} threads; a checkpoint of "
        f"{size_bytes / 2**20:.0f} MiB"
    )
    print(f"measured {rounds} rounds of {steps} steps a case; median (quartiles)\n")
    for name in taken[0]:
        scale, unit = (1, "s") if name == "step" else (100, "% of a step")
        print(columns([name, quartiles([r[name] for r in taken]).show(".2f", scale)], (12, 26)), unit)


def one_round(trainer: Trainer, steps: int) -> dict[str, float]:
    """Returns the seconds of a plain step, and the shares of it that the module names."""
    step = statistics.median(seconds_of(trainer.train_step) for _ in range(steps))
    snapshot = seconds_of(lambda: trainer.save(step=True))
    beside = sum(seconds_of(trainer.train_step) for _ in range(steps))
    trainer.checkpoints.wait()
    waited = seconds_of(lambda: trainer.save(step=True)) + seconds_of(trainer.checkpoints.wait)
    return {"step": step, "snapshot": snapshot / step, "stall": (beside - steps * step) / step, "waited": waited / step}


if __name__ == "__main__":
    run(main)
