"""Training speed beside a plain PyTorch loop on the CPU, in one process and in turns; `benchmarks.gpu` times a GPU.

    python -m benchmarks.speed.train_speed [--hidden-dim 256 --rounds 9]

Sides, for each cell and width, with 2 layers, embedding 256, batches of 128 windows of 128 characters of random text,
on all cores:

    reference  reference_loop.py, fp32, with glibc's allocator at its defaults
    fp32       the trainer's own loop: batch, synchronisation, step, metrics.jsonl, in fp32
    native     the same in `mixed_precision: native`: bf16 where the CPU computes it

Each round gives every side one turn of `--steps` steps after an untimed one. Printed are medians and quartiles over
rounds, and of the ratio to the reference within a round. FLOPs are those of the matrix products (train/loop/flops.py:
6 a weight and character, Chowdhery et al., arXiv 2204.02311, appendix B); the peak is the best of many products of
1024 x 1024 matrices, measured before every turn in the type that a side multiplies in. Memory is the peak resident set
of a turn above what the process held before. `input + logging` is the share of a turn that goes into reading batches,
synchronising and logging (every 10th step, as by default).
"""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import (
    Cell,
    columns,
    default_allocator,
    in_turns,
    machine_line,
    quartiles,
    ratios,
    reset_peak_memory,
    run,
    status_bytes,
)
from benchmarks.speed.reference_loop import losses
from benchmarks.training import make_trainer, options_of, write_random_text
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import prepare
from train.distributed.precision import training_precision
from train.distributed.setup import set_threads
from train.loop.flops import flops_per_char, measured_peak
from train.loop.memory import keep_freed_memory
from train.tracking.console import Display
from train.tracking.metrics_log import MetricsLog
from train.tracking.recorder import Recorder

_WIDTHS = (18, 28, 24, 9, 9, 7, 7, 18)


@dataclass(frozen=True)
class Turn:
    """Measurements of one turn. overhead: share of its time. memory: bytes. peak: FLOP/s of the CPU."""

    chars_per_s: float
    overhead: float
    memory: int
    peak: float


def trainer_steps(config: RunConfig) -> Iterator[float]:
    """Runs the trainer's loop; yields, at every step, the seconds of input, synchronisation and logging."""
    run_dir = Path(config.train.run_dir)
    run_dir.mkdir()
    trainer = make_trainer(config, Recorder(MetricsLog(run_dir / "metrics.jsonl", 0)))
    schedule, epoch = trainer.schedule, trainer.data.plan.steps_per_epoch
    with Display(0, epoch, schedule.share, schedule.remaining_s) as trainer.recorder.display:
        while True:
            began = time.perf_counter()
            trainer.next_step()
            ready = time.perf_counter()
            trainer.train_step()
            stepped = time.perf_counter()
            if trainer.schedule.log_due():
                trainer.log()
            yield ready - began + time.perf_counter() - stepped


def reference_steps(config: RunConfig) -> Iterator[float]:
    """Runs the plain loop on the same text; its input is not timed apart."""
    corpus, data = prepare(config.data), config.data
    ids = torch.from_numpy(np.asarray(corpus.train).astype(np.int64))  # (N,)
    for _ in losses(config.model, ids, len(corpus.vocab), data.batch_size, data.seq_len):
        yield 0.0


def take_turn(loop: Iterator[float], dtype: torch.dtype, keep_memory: bool, steps: int, chars: int) -> Turn:
    """Takes one untimed and `steps` timed steps of `chars` characters."""
    default_allocator()
    if keep_memory:
        keep_freed_memory()
    peak, base = measured_peak(dtype), reset_peak_memory()
    next(loop)
    began = time.perf_counter()
    overhead = sum(itertools.islice(loop, steps))
    seconds = time.perf_counter() - began
    return Turn(steps * chars / seconds, overhead / seconds, status_bytes("VmHWM") - base, peak)


def compare(options: dict[str, Any], rounds: int, steps: int) -> list[str]:
    """Measures one cell and width; returns its table."""
    config = write_random_text(options)

    def trainer(precision: str) -> Iterator[float]:
        changed = {"train.mixed_precision": precision, "train.run_dir": f"{config.train.run_dir}-{precision}"}
        return trainer_steps(load_config(None, options | changed))

    native = training_precision("native")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[native]
    loops = {
        "reference": (reference_steps(config), torch.float32, False),
        "fp32": (trainer("no"), torch.float32, True),
        f"native ({'fp32' if native == 'no' else native})": (trainer("native"), dtype, True),
    }
    chars = config.data.batch_size * config.data.seq_len
    sides = {name: partial(take_turn, *side, steps, chars) for name, side in loops.items()}
    title = f"{config.model.rnn} {config.model.hidden_dim}"
    return table(title, in_turns(sides, rounds), flops_per_char(config.model, len(prepare(config.data).vocab)))


def table(title: str, taken: dict[str, list[Turn]], flops: int) -> list[str]:
    """Formats the results. flops: of a character."""
    titles = ("characters/s", "of the reference", "GFLOP/s", "of peak", "peak", "MiB", "input + logging")
    lines = [columns([title, *titles], _WIDTHS)]
    reference = [turn.chars_per_s for turn in taken["reference"]]
    for name, turns in taken.items():
        values = [turn.chars_per_s for turn in turns]
        speed, peak = quartiles(values), quartiles([turn.peak for turn in turns])
        share = quartiles([flops * turn.chars_per_s / turn.peak for turn in turns]).median
        cells = [name, speed.show(), ratios(values, reference).show(".2f"), f"{speed.median * flops / 1e9:,.0f}"]
        cells += [f"{100 * share:.0f} %", f"{peak.median / 1e9:,.0f}", f"{max(t.memory for t in turns) / 2**20:,.0f}"]
        overhead = quartiles([turn.overhead for turn in turns]).median
        lines.append(columns([*cells, "-" if name == "reference" else f"{100 * overhead:.2f} %"], _WIDTHS))
    return [*lines, ""]


def train_speed(
    hidden_dim: Annotated[list[int] | None, typer.Option(help="H; repeatable. Default: 256, 512, 1024.")] = None,
    rnn: Annotated[list[Cell] | None, typer.Option(help="Cell; repeatable. Default: both.")] = None,
    batch_size: Annotated[int, typer.Option(help="B.", min=1)] = 128,
    seq_len: Annotated[int, typer.Option(help="T.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=2)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a turn at H 256; fewer of wider models.", min=1)] = 6,
) -> None:
    """Compare the trainer's step with a plain loop's."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    threads = set_threads(0)
    print(machine_line())
    print(f"size     2 layers, embedding 256, {batch_size} windows of {seq_len} characters a step, {threads} threads")
    print(f"measured {rounds} rounds; median (quartiles)\n")
    for width in hidden_dim or [256, 512, 1024]:
        for cell in rnn or list(Cell):
            size = {"rnn": cell, "hidden_dim": width, "num_layers": 2, "batch_size": batch_size}
            with tempfile.TemporaryDirectory() as folder:
                options = options_of(Path(folder), **size, seq_len=seq_len)
                options |= {"model.embedding_dim": 256, "train.threads": 0, "log.every": 10}
                print("\n".join(compare(options, rounds, max(1, steps * 256**2 // max(width, 256) ** 2))), flush=True)


if __name__ == "__main__":
    run(train_speed)
