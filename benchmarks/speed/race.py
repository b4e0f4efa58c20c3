"""Seconds to a target loss on one device: the trainer with a config, against a transformer of 10.7M parameters.

    python -m benchmarks.speed.race [--config configs/shakespeare.yaml --target 1.4697 --max-time 600]

Both are trained in this run, one after the other, on the same split of the same text: the trainer's own loop with the
config's schedule, without checkpoints; and reference_transformer.py with its published settings, to the end of its
5000 steps. After every `--interval` seconds of training a side is evaluated on the complete validation split by the
`windows` protocol, in fp32: each window of 256 characters from a zero state. The default target is what nanoGPT's
README gives as that model's best (https://github.com/karpathy/nanoGPT), there an estimate from random windows.

The clock of a side runs while it trains, its first step included, and stops while it is evaluated. A target counts as
reached at the evaluation that finds it, so seconds are exact to an interval. A side ends there, at its schedule's end,
at `--max-time` or at `--steps`. FLOPs are those of train/flops.py and, for the transformer, 6 N + 12 layers width T a
character (PaLM, arXiv 2204.02311, appendix B); the peak is that of bf16, published for a GPU and measured on a CPU.
Memory is the peak above what was held before: what torch allocated on a GPU, the resident set on a CPU under Linux.
"""

import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import columns, machine_line, reset_peak_memory, run, status_bytes
from benchmarks.speed.reference_transformer import Recipe, Shape, TransformerTraining
from benchmarks.training import log_if_due, make_trainer, reset_accelerator, synchronize
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import Corpus, prepare
from charrnn.errors import ConfigError, CorpusError, TrainingError
from charrnn.windows import window_batches
from train.dataloader import IdSource
from train.distributed.setup import device_name, make_accelerator, set_threads
from train.flops import flops_per_char, peak_flops
from train.memory import keep_freed_memory
from train.precision import cpu_multiplies_bf16

_ROWS = 64
_WIDTHS = (22, 12, 11, 13, 10, 14, 8)


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
    """Seconds of training; stopped until it is started. device: synchronised when it is stopped."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._total, self._since = device, 0.0, math.nan

    def start(self) -> None:
        """Starts, or resumes."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stops, once the device has finished its work."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        self._total, self._since = self(), math.nan

    def __call__(self) -> float:
        """Seconds so far."""
        return self._total + (0.0 if math.isnan(self._since) else time.perf_counter() - self._since)


class Side(Protocol):
    """A contestant. precision: bf16, fp16 or no. flops_per_char: of training. chars_per_step: of a training step."""

    name: str
    precision: str
    flops_per_char: int
    chars_per_step: int
    model: nn.Module

    def train_step(self) -> bool:
        """Takes one step; returns False, and takes none, at the schedule's end."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Maps (R, T) to (R, T, V), each row by itself."""
        ...


class Ours:
    """The product's trainer."""

    def __init__(self, config: RunConfig, clock: Clock) -> None:
        self._trainer = make_trainer(config, clock=clock)
        self.model: nn.Module = self._trainer.model
        self.precision = self._trainer.accelerator.mixed_precision
        self.name = f"{config.model.rnn} {config.model.num_layers} x {config.model.hidden_dim}"
        self.flops_per_char = flops_per_char(config.model, len(self._trainer.data.vocab))
        self.chars_per_step = config.data.batch_size * config.data.seq_len

    def train_step(self) -> bool:
        """Takes one step, and logs when it is due."""
        if not synchronize(self._trainer):
            return False
        self._trainer.train_step()
        log_if_due(self._trainer)
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Computes them from a zero state."""
        model = self._trainer.model
        return model(ids, model.zero_state(len(ids), ids.device))[0]


class Reference:
    """The transformer."""

    def __init__(self, shape: Shape, recipe: Recipe, corpus: Corpus, device: torch.device) -> None:
        bf16 = device.type == "cuda" or cpu_multiplies_bf16()
        ids = IdSource(corpus.train, device)
        self._training = TransformerTraining(shape, recipe, len(corpus.vocab), ids, bf16=bf16)
        self.model: nn.Module = self._training.model
        self.precision = "bf16" if bf16 else "no"
        self.name = f"transformer {shape.layers} x {shape.width}"
        self.flops_per_char = self._training.model.flops_per_char()
        self.chars_per_step = recipe.batch_size * shape.context

    def train_step(self) -> bool:
        """Takes one step, unless the recipe's last was taken."""
        if self._training.step_number >= self._training.recipe.steps:
            return False
        self._training.step()
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Computes them for each window by itself."""
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


@torch.no_grad()
def windows_loss(side: Side, ids: IdSource, window: int) -> float:
    """Evaluates on all of `ids` by the `windows` protocol, in fp32; returns nats/char. Raises: TrainingError."""
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


def warm_up(makers: Sequence[Callable[[Clock], Side]], device: torch.device) -> None:
    """Takes two steps of each side, thrown away: libraries are loaded and kernels chosen before any clock starts."""
    for make in makers:
        side = make(Clock(device))
        for _ in range(2):
            side.train_step()


def race(make: Callable[[Clock], Side], ids: IdSource, window: int, limits: Limits) -> Result:
    """Trains one side until it ends, and evaluates it on `ids` meanwhile."""
    clock, held = Clock(ids.device), _memory(ids.device, reset=True)
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
        print(f"{side.name}: {seconds:.1f} s, {result.steps} steps, {loss:.4f}", file=sys.stderr)
        if loss <= limits.target:
            result.reached_s = seconds
        due = max(due, seconds // limits.interval * limits.interval) + limits.interval
    result.seconds = clock()
    result.chars_per_s = result.steps * side.chars_per_step / result.seconds
    after = _memory(ids.device)
    result.memory = None if held is None or after is None else after - held
    return result


def _memory(device: torch.device, *, reset: bool = False) -> int | None:
    """Returns the peak bytes since the last `reset`, which returns those held now; None where that is unknown."""
    if reset:
        gc.collect()
    if device.type == "cuda":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    return reset_peak_memory() if reset else status_bytes("VmHWM")


def table(results: list[Result], target: float, peak: float | None) -> list[str]:
    """Formats the results. peak: FLOP/s of the device in bf16, None when that is not known."""
    titles = ("model", "parameters", "precision", "chars/s", "TFLOP/s", "of bf16 peak", "MiB")
    lines = [f"{columns(titles, _WIDTHS)}  seconds to {target:g} nats/char"]
    for r in results:
        flops = r.chars_per_s * r.flops_per_char
        cells = [r.name, f"{r.parameters:,}", "fp32" if r.precision == "no" else r.precision, f"{r.chars_per_s:,.0f}"]
        cells += [f"{flops / 1e12:.3f}", f"{100 * flops / peak:.1f} %" if peak else "-"]
        cells += ["-" if r.memory is None else f"{r.memory / 2**20:,.0f}"]
        seconds, loss = min(r.curve, key=lambda point: point[1])
        if r.reached_s is None:
            reached = f"not reached in {r.seconds:.1f} s and {r.steps} steps; best {loss:.4f} at {seconds:.1f} s"
        else:
            reached = f"{r.reached_s:.1f} ({r.steps} steps, {loss:.4f})"
        lines.append(f"{columns(cells, _WIDTHS)}  {reached}")
    return lines


def run_race(config: RunConfig, limits: Limits, shape: Shape, recipe: Recipe) -> list[str]:
    """Runs both sides, one after the other; returns the device's line and the table. Raises: CharRNNError."""
    corpus = prepare(config.data, progress=True)
    if len(corpus.val) < 2 or len(corpus.train) <= shape.context:
        raise CorpusError(
            f"{len(corpus.train)} characters to train on and {len(corpus.val)} to validate on are too few for windows "
            f"of {shape.context}; use a longer text"
        )
    reset_accelerator()
    threads, device = set_threads(config.train.threads), make_accelerator(config.train).device
    val = IdSource(corpus.val, device)
    makers: list[Callable[[Clock], Side]] = [
        lambda clock: Ours(config, clock),
        lambda clock: Reference(shape, recipe, corpus, device),
    ]
    warm_up(makers, device)
    results = [race(make, val, shape.context, limits) for make in makers]
    about = f"device   {device_name(device)}; {threads} threads\n"
    return [about, *table(results, limits.target, peak_flops(device, "bf16"))]


def main(
    config: Annotated[Path, typer.Option(help="The trainer's experiment.")] = Path("configs/shakespeare.yaml"),
    data: Annotated[str, typer.Option(help="Text, as train/main.py takes it.")] = "tinyshakespeare",
    target: Annotated[float, typer.Option(help="Loss to reach, nats/char.")] = 1.4697,
    max_time: Annotated[float, typer.Option(help="Seconds of training a side at most.", min=0.001)] = 600,
    interval: Annotated[float, typer.Option(help="Seconds of training between evaluations.", min=0.001)] = 5,
    steps: Annotated[int, typer.Option(help="Steps of a side at most; 0 = no such limit.", min=0)] = 0,
    device: Annotated[Device, typer.Option(help="Where both are trained.")] = Device.auto,
) -> None:
    """Race the trainer against a transformer to a loss."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device here; use --device auto or cpu")
    if device is Device.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as run_dir:
        loaded = load_config(config, {"data.source": data, "train.run_dir": run_dir})
        lines = run_race(loaded, Limits(target, max_time, interval, steps), Shape(), Recipe())
    print(machine_line())
    print(f"race     {config.name} on {data}, to {target:g} nats/char by the windows protocol")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
