"""Seconds to a target loss on one device: the trainer with a config, against a transformer of 10.7M parameters.

    python -m benchmarks.speed.race
    python -m benchmarks.speed.race --config configs/shakespeare.yaml --target 1.4697 --max-time 600

Both are trained in this run, one after the other, on the same split of the same text: the trainer's own loop with the
config's schedule, without checkpoints; and reference_transformer.py with its published settings, to the end of its
5000 updates. After every `--interval` seconds of training a side is read on the whole validation split by the `windows`
protocol, in fp32: each window of 256 characters by itself. The default target is what nanoGPT's README gives as that
model's best (https://github.com/karpathy/nanoGPT), there an estimate from random windows.

The clock of a side runs while it trains, its first update included, and stands still while it is evaluated. A target
counts as reached at the evaluation that finds it, so seconds are exact to an interval. A side ends there, at its
schedule's end, at `--max-time` or at `--steps`. FLOPs are those of train/flops.py and, for the transformer,
6 N + 12 layers width T a character (PaLM, arXiv 2204.02311, appendix B); the peak is that of bf16, published for a GPU
and measured on a CPU. Memory is the most that a side held above what was held before it: what torch allocated on a
GPU, the process's resident memory on a CPU under Linux.
"""

import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import machine
from benchmarks.speed.reference_transformer import Recipe, Shape, TransformerTraining
from benchmarks.speed.train_speed import reset_peak_memory, status_bytes
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import Corpus, prepare
from charrnn.errors import CharRNNError, ConfigError, CorpusError, TrainingError
from charrnn.windows import window_batches
from train.checkpoint.vocab_transfer import StartingPoint
from train.dataloader import IdSource
from train.distributed.setup import make_accelerator, set_threads
from train.flops import peak_flops
from train.memory import keep_freed_memory
from train.precision import cpu_multiplies_bf16
from train.tracking.recorder import Recorder
from train.trainer import Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROWS = 64


class Device(StrEnum):
    """What --device names."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Limits:
    """When a side is evaluated and ends. target: nats/char. seconds: of training. steps: 0 = no such limit."""

    target: float
    seconds: float
    interval: float
    steps: int = 0


class Clock:
    """Seconds of training; it stands still unless it is started. device: what is waited for when it is stopped."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._total, self._since = device, 0.0, math.nan

    def start(self) -> None:
        """Goes on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stands still, once the device has done what it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        self._total, self._since = self(), math.nan

    def __call__(self) -> float:
        """Seconds so far."""
        return self._total + (0.0 if math.isnan(self._since) else time.perf_counter() - self._since)


class Side(Protocol):
    """Who races. precision: bf16, fp16 or no. flops_per_char: of training. chars_per_step: of an update."""

    name: str
    precision: str
    flops_per_char: int
    chars_per_step: int

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    def train_step(self) -> bool:
        """One update; False, and none, at the schedule's end."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """(R, T) to (R, T, V), each row by itself."""
        ...


class Ours:
    """The product's trainer."""

    def __init__(self, config: RunConfig, corpus: Corpus, clock: Clock) -> None:
        _forget_accelerator()
        accelerator = make_accelerator(config.train)
        run_dir = Path(config.train.run_dir)
        start = StartingPoint(corpus.vocab)
        self._trainer = Trainer(config, corpus, start, accelerator, run_dir, Recorder(), clock)
        self.model, self.precision = self._trainer.model, accelerator.mixed_precision
        self.name = f"{config.model.rnn} {config.model.num_layers} x {config.model.hidden_dim}"
        self.flops_per_char = self._trainer.flops_per_char
        self.chars_per_step = config.data.batch_size * config.data.seq_len

    def train_step(self) -> bool:
        """One update, and the log when it is due."""
        if not self._trainer._go_on():
            return False
        self._trainer.train_step()
        every = self._trainer.config.log.every
        if every and self._trainer.progress.step % every == 0:
            self._trainer.log()
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """From a zero state."""
        return self._trainer.model(ids, self._trainer.model.zero_state(len(ids), ids.device))[0]


class Reference:
    """The transformer."""

    def __init__(self, shape: Shape, recipe: Recipe, corpus: Corpus, device: torch.device) -> None:
        bf16 = device.type == "cuda" or cpu_multiplies_bf16()
        ids = IdSource(corpus.train, device)
        self._training = TransformerTraining(shape, recipe, len(corpus.vocab), ids, bf16=bf16)
        self.model, self.precision = self._training.model, "bf16" if bf16 else "no"
        self.name = f"transformer {shape.layers} x {shape.width}"
        self.flops_per_char = self._training.model.flops_per_char()
        self.chars_per_step = recipe.batch_size * shape.context

    def train_step(self) -> bool:
        """One update, unless the recipe's last was made."""
        if self._training.step_number >= self._training.recipe.steps:
            return False
        self._training.step()
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Of a window by itself."""
        return self.model(ids)


@dataclass
class Result:
    """How a side did. seconds, chars_per_s: of training. reached_s: None when the target was not reached."""

    name: str
    parameters: int
    precision: str
    flops_per_char: int
    chars_per_s: float = 0.0
    memory: int | None = None
    seconds: float = 0.0
    steps: int = 0
    reached_s: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, nats/char)

    def best(self) -> tuple[float, float]:
        """(seconds, nats/char) of the best evaluation."""
        return min(self.curve, key=lambda point: point[1])


@torch.no_grad()
def windows_loss(side: Side, ids: IdSource, window: int) -> float:
    """nats/char on all of `ids` by the `windows` protocol, in evaluation mode and fp32. Raises: TrainingError."""
    total, count = torch.zeros((), dtype=torch.float32, device=ids.device), 0
    side.model.eval()
    for batch in window_batches(len(ids), window, _ROWS):
        chars = ids.windows(batch.starts, batch.length + 1)  # (R, T + 1)
        logits = side.logits(chars[:, :-1])  # (R, T, V)
        total += F.cross_entropy(logits.float().transpose(1, 2), chars[:, 1:], reduction="sum")
        count += chars[:, 1:].numel()
    side.model.train()
    loss = total.item() / count
    if not math.isfinite(loss):
        raise TrainingError(f"{side.name} has diverged: its validation loss is {loss}; try another --config")
    return loss


def race(make: Callable[[Clock], Side], ids: IdSource, window: int, limits: Limits) -> Result:
    """Trains one side until it ends, and evaluates it on `ids` on the way."""
    clock, held = Clock(ids.device), _memory(ids.device, begin=True)
    side = make(clock)
    weights = sum(p.numel() for p in side.model.parameters())
    result = Result(side.name, weights, side.precision, side.flops_per_char)
    side.model.train()
    ended, due = False, limits.interval
    while not ended and result.reached_s is None:
        clock.start()
        while True:
            ended = not side.train_step()
            result.steps += not ended
            ended = ended or result.steps == limits.steps or clock() >= limits.seconds
            if ended or clock() >= due:
                break
        clock.stop()
        seconds, loss = clock(), windows_loss(side, ids, window)
        result.curve.append((seconds, loss))
        print(f"{side.name}: {seconds:.1f} s, {result.steps} updates, {loss:.4f}", file=sys.stderr)
        if loss <= limits.target:
            result.reached_s = seconds
        due = max(due, seconds // limits.interval * limits.interval) + limits.interval
    result.seconds = clock()
    result.chars_per_s = result.steps * side.chars_per_step / result.seconds
    after = _memory(ids.device)
    result.memory = None if held is None or after is None else after - held
    return result


def _memory(device: torch.device, *, begin: bool = False) -> int | None:
    """Bytes held at most since the last `begin`, which returns what is held now. None where nothing tells."""
    if device.type == "cuda":
        if begin:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    return reset_peak_memory() if begin else status_bytes("VmHWM")


def table(results: list[Result], target: float, peak: float | None) -> list[str]:
    """The lines to print. peak: FLOP/s of the device in bf16, None when that is not known."""
    lines = [
        f"{'model':<22}{'parameters':>12}{'precision':>11}{'chars/s':>13}{'TFLOP/s':>10}{'of bf16 peak':>14}{'MiB':>8}"
        f"  seconds to {target:g} nats/char"
    ]
    for r in results:
        flops = r.chars_per_s * r.flops_per_char
        share = f"{100 * flops / peak:.1f} %" if peak else "-"
        memory = "-" if r.memory is None else f"{r.memory / 2**20:,.0f}"
        seconds, loss = r.best()
        precision = "fp32" if r.precision == "no" else r.precision
        missed = f"not reached in {r.seconds:.1f} s and {r.steps} updates; best {loss:.4f} at {seconds:.1f} s"
        reached = missed if r.reached_s is None else f"{r.reached_s:.1f} ({r.steps} updates, {loss:.4f})"
        lines.append(
            f"{r.name:<22}{r.parameters:>12,}{precision:>11}{r.chars_per_s:>13,.0f}"
            f"{flops / 1e12:>10.3f}{share:>14}{memory:>8}  {reached}"
        )
    return lines


def run_race(config: RunConfig, limits: Limits, shape: Shape, recipe: Recipe) -> list[str]:
    """Both sides, one after the other; returns the table. Raises: CharRNNError."""
    corpus = prepare(config.data, progress=True)
    if len(corpus.val) < 2 or len(corpus.train) <= shape.context:
        raise CorpusError(
            f"{len(corpus.train)} characters to train on and {len(corpus.val)} to validate on are too few for windows "
            f"of {shape.context}; use a longer text"
        )
    _forget_accelerator()
    device = make_accelerator(config.train).device
    torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device))  # the device's start is nobody's time
    val = IdSource(corpus.val, device)
    makers: list[Callable[[Clock], Side]] = [
        lambda clock: Ours(config, corpus, clock),
        lambda clock: Reference(shape, recipe, corpus, device),
    ]
    results = [race(make, val, shape.context, limits) for make in makers]
    return table(results, limits.target, peak_flops(device, "bf16"))


def _forget_accelerator() -> None:
    """Accelerate's settings are one a process; here they change."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def choose_device(device: Device) -> str:
    """Has accelerate use `device`; returns its name for the table. Raises: ConfigError."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device here; use --device auto or cpu")
    if device is Device.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    on_gpu = device is not Device.cpu and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else str(machine()["cpu"])


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="The trainer's experiment.")] = Path("configs/shakespeare.yaml"),
    data: Annotated[str, typer.Option(help="Text, as train/main.py takes it.")] = "tinyshakespeare",
    target: Annotated[float, typer.Option(help="Loss to reach, nats/char.")] = 1.4697,
    max_time: Annotated[float, typer.Option(help="Seconds of training a side at most.", min=0.001)] = 600,
    interval: Annotated[float, typer.Option(help="Seconds of training between evaluations.", min=0.001)] = 5,
    steps: Annotated[int, typer.Option(help="Updates of a side at most; 0 = no such limit.", min=0)] = 0,
    device: Annotated[Device, typer.Option(help="Where both are trained.")] = Device.auto,
) -> None:
    """Race the trainer against a transformer to a loss."""
    try:
        name = choose_device(device)
        threads, here = set_threads(0), machine()
        keep_freed_memory()
        with tempfile.TemporaryDirectory() as run_dir:
            options = {"data.source": data, "train.run_dir": run_dir}
            lines = run_race(load_config(config, options), Limits(target, max_time, interval, steps), Shape(), Recipe())
    except CharRNNError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    print(f"device   {name}; {threads} threads; torch {here['torch']}; {here['time']}")
    print(f"race     {config.name} on {data}, to {target:g} nats/char by the windows protocol\n")
    print("\n".join(lines))


if __name__ == "__main__":
    app()
