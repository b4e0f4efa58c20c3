"""How fast the trainer trains, beside a plain loop of torch's own parts, in one process and in turns.

    python -m benchmarks.speed.train_speed
    python -m benchmarks.speed.train_speed --hidden-dim 256 --rounds 9

Sides, for each cell and width, with 2 layers, embedding 256, batches of 128 windows of 128 characters (of random text:
nothing is learnt), and the machine's cores:

    reference  reference_loop.py, fp32, with glibc's allocator as a program finds it
    fp32       the trainer's own loop: batch, update, agreement, metrics.jsonl, in fp32
    native     the same in `mixed_precision: native`: bf16 where the CPU computes it

In a round every side has one turn of `--steps` steps after an untimed one. Printed are medians and quartiles over
rounds, and of the ratio to the reference within a round. FLOPs are those of the matrix products (train/flops.py: 6 a
weight and character, Chowdhery et al., arXiv 2204.02311, appendix B); the peak is the best of many products of
1024 x 1024 matrices, measured before every round in the type that a side multiplies in. Memory is the most that the
process holds in a turn, above what it held before. `input + logging` is the share of a turn's time that goes into
reading batches, into the check that precedes an update, and into the log (every 10th update, as by default).
"""

import ctypes
import itertools
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from accelerate.state import AcceleratorState, GradientState

from benchmarks.machine import machine
from benchmarks.random_text import config_options, write_text
from benchmarks.scaling.estimates import spread
from benchmarks.speed.reference_loop import losses
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import prepare
from train.checkpoint.vocab_transfer import StartingPoint
from train.distributed.setup import make_accelerator, set_threads
from train.flops import flops_per_char, measured_peak
from train.memory import keep_freed_memory
from train.precision import training_precision
from train.tracking.console import Display
from train.tracking.recorder import Recorder
from train.trainer import Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_LOG_EVERY = 10


@dataclass
class Side:
    """What takes turns. steps: yields seconds of input and logging at every step. kept: whether memory is kept."""

    name: str
    steps: Iterator[float]
    dtype: torch.dtype
    kept: bool
    chars_per_s: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)


def plain_memory() -> None:
    """glibc as a program finds it once a block above 32 MiB was freed (mallopt(3)), and without anything kept."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at the most that it moves to by itself
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD, which follows at twice that
        libc.malloc_trim(0)


def trainer_steps(config: RunConfig) -> Iterator[float]:
    """The trainer's loop, a step at a time; yields the seconds that input, agreement and logging took."""
    AcceleratorState._reset_state(True)  # one process, two precisions
    GradientState._reset_state()
    corpus, accelerator, run_dir = prepare(config.data), make_accelerator(config.train), Path(config.train.run_dir)
    run_dir.mkdir(exist_ok=True)
    recorder = Recorder.open(config, run_dir, {}, 0)
    trainer = Trainer(config, corpus, StartingPoint(corpus.vocab), accelerator, run_dir, recorder)
    with Display(0, 0.0, 0, trainer.plan.steps_per_epoch) as recorder.display:
        while True:
            began = time.perf_counter()
            trainer._go_on()
            ready = time.perf_counter()
            trainer.train_step()
            stepped = time.perf_counter()
            if trainer.progress.step % _LOG_EVERY == 0:
                trainer.log()
            yield ready - began + time.perf_counter() - stepped


def reference_steps(config: RunConfig) -> Iterator[float]:
    """The plain loop on the same text; what its input takes is not told apart."""
    corpus, data = prepare(config.data), config.data
    ids = torch.from_numpy(np.asarray(corpus.train).astype(np.int64))
    for _ in losses(config.model, ids, len(corpus.vocab), data.batch_size, data.seq_len):
        yield 0.0


def take_turn(side: Side, steps: int, chars: int) -> None:
    """One untimed and `steps` timed steps, noted in `side`. chars: characters of a step."""
    plain_memory()
    if side.kept:
        keep_freed_memory()
    side.peak.append(measured_peak(side.dtype))
    base = reset_peak_memory()
    next(side.steps)
    began = time.perf_counter()
    overhead = sum(itertools.islice(side.steps, steps))
    seconds = time.perf_counter() - began
    side.chars_per_s.append(steps * chars / seconds)
    side.overhead.append(overhead / seconds)
    side.memory.append(status_bytes("VmHWM") - base)


def reset_peak_memory() -> int:
    """Begins to watch the most that this process holds, and returns what it holds now, in bytes (Linux: proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def sides_of(folder: Path, rnn: str, hidden_dim: int, batch_size: int, seq_len: int) -> tuple[RunConfig, list[Side]]:
    """A config of this cell and width, and who takes turns with it."""
    size = {"rnn": rnn, "hidden_dim": hidden_dim, "num_layers": 2, "seq_len": seq_len, "rows": batch_size}
    options = {**config_options(folder, size), "log.every": _LOG_EVERY}

    def config(precision: str) -> RunConfig:
        run_dir = str(folder / f"{rnn}-{hidden_dim}-{precision}")
        return load_config(None, {**options, "train.mixed_precision": precision, "train.run_dir": run_dir})

    used = training_precision("native")
    native = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[used]
    makers: list[tuple[str, Callable[[RunConfig], Iterator[float]], str, torch.dtype, bool]] = [
        ("reference", reference_steps, "no", torch.float32, False),
        ("fp32", trainer_steps, "no", torch.float32, True),
        (f"native ({'fp32' if used == 'no' else used})", trainer_steps, "native", native, True),
    ]
    return config("no"), [Side(name, make(config(p)), dtype, kept) for name, make, p, dtype, kept in makers]


@app.command()
def train_speed(
    hidden_dim: Annotated[list[int] | None, typer.Option(help="H; repeatable. Default: 256, 512, 1024.")] = None,
    rnn: Annotated[list[Literal["GRU", "LSTM"]] | None, typer.Option(help="Cell; repeatable. Default: both.")] = None,
    batch_size: Annotated[int, typer.Option(help="B.", min=1)] = 128,
    seq_len: Annotated[int, typer.Option(help="T.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=2)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a turn at H 256; fewer of wider models.", min=1)] = 6,
) -> None:
    """Compare the trainer's step with a plain loop's."""
    threads = set_threads(0)
    here = machine()
    print(f"machine  {here['cpu']}, {threads} threads; torch {here['torch']}; {here['time']}")
    print(f"size     2 layers, embedding 256, {batch_size} windows of {seq_len} characters a step")
    print(f"measured {rounds} rounds; median (quartiles)\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for width in hidden_dim or [256, 512, 1024]:
            for cell in rnn or ["GRU", "LSTM"]:
                config, sides = sides_of(folder, cell, width, batch_size, seq_len)
                write_text(config)
                for _ in range(rounds):
                    for side in sides:
                        take_turn(side, max(1, steps * 256**2 // max(width, 256) ** 2), batch_size * seq_len)
                symbols = len(prepare(config.data).vocab)
                print("\n".join(table(f"{cell} {width}", sides, flops_per_char(config.model, symbols))), flush=True)


def table(title: str, sides: list[Side], flops: int) -> list[str]:
    """The lines to print. flops: of a character."""
    lines = [
        f"{title:<18}{'characters/s':>28}{'of the reference':>24}{'GFLOP/s':>9}{'of peak':>9}{'peak':>7}"
        f"{'MiB':>7}{'input + logging':>18}"
    ]
    for side in sides:
        speed = spread(side.chars_per_s)
        ratio = spread([a / b for a, b in zip(side.chars_per_s, sides[0].chars_per_s, strict=True)])
        share = spread([c * flops / p for c, p in zip(side.chars_per_s, side.peak, strict=True)])
        overhead = f"{100 * spread(side.overhead).median:.2f} %" if side.kept else "-"
        lines.append(
            f"{side.name:<18}{f'{speed.median:,.0f} ({speed.q1:,.0f} to {speed.q3:,.0f})':>28}"
            f"{f'{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})':>24}{speed.median * flops / 1e9:>9,.0f}"
            f"{100 * share.median:>7.0f} %{spread(side.peak).median / 1e9:>7,.0f}{max(side.memory) / 2**20:>7,.0f}"
            f"{overhead:>18}"
        )
    return [*lines, ""]


if __name__ == "__main__":
    app()
