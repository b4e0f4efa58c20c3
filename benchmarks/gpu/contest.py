"""Seconds of training to a loss on one device: what the trainer and the transformer have in common, and their clock.

After every interval of training a side is evaluated on the complete validation split by the `windows` protocol, in
fp32: each window of 256 characters from a zero state. The clock of a side runs while it trains, its first step
included, and stops while it is evaluated. A target counts as reached at the evaluation that finds it, so seconds are
exact to an interval. A side ends there, at its schedule's end, or at a limit.
"""

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.reference_transformer import Recipe, Shape, TransformerTraining
from benchmarks.training import log_if_due, make_trainer, synchronize
from charrnn.config import RunConfig
from charrnn.data.corpus import Corpus
from charrnn.errors import TrainingError
from charrnn.windows import window_batches
from train.loop.dataloader import IdSource

_ROWS = 64


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
    """A contestant. chars_per_step: of a training step."""

    chars_per_step: int
    model: nn.Module

    def train_step(self) -> bool:
        """Takes one step; returns False, and takes none, at the schedule's end."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Maps (R, T) to (R, T, V), each row from a zero state."""
        ...


class Ours:
    """The product's trainer with a config's schedule, without checkpoints."""

    def __init__(self, config: RunConfig, clock: Clock) -> None:
        self.trainer = make_trainer(config, clock=clock)
        self.model: nn.Module = self.trainer.model
        self.chars_per_step = config.data.batch_size * config.data.seq_len

    def train_step(self) -> bool:
        """Takes one step, and logs when it is due."""
        if not synchronize(self.trainer):
            return False
        self.trainer.train_step()
        log_if_due(self.trainer)
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Computes them from a zero state."""
        model = self.trainer.model
        return model(ids, model.zero_state(len(ids), ids.device))[0]


class Reference:
    """The transformer, in bf16 on a GPU."""

    def __init__(self, shape: Shape, recipe: Recipe, corpus: Corpus, device: torch.device) -> None:
        ids = IdSource(corpus.train, device)
        self.training = TransformerTraining(shape, recipe, len(corpus.vocab), ids, bf16=device.type == "cuda")
        self.model: nn.Module = self.training.model
        self.chars_per_step = recipe.batch_size * shape.context

    def train_step(self) -> bool:
        """Takes one step, unless the recipe's last was taken."""
        if self.training.step_number >= self.training.recipe.steps:
            return False
        self.training.step()
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Computes them for each window by itself."""
        return self.model(ids)


@dataclass
class Result:
    """How a side did. seconds, chars_per_s: of training. memory: peak bytes on a GPU. reached_s: None = not reached."""

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
        raise TrainingError(f"training has diverged: the validation loss is {loss}")
    return loss


def warm_up(makers: Sequence[Callable[[Clock], Side]], device: torch.device) -> None:
    """Takes two steps of each side, thrown away: libraries are loaded and kernels chosen before any clock starts."""
    for make in makers:
        side = make(Clock(device))
        for _ in range(2):
            side.train_step()


def race(make: Callable[[Clock], Side], ids: IdSource, window: int, limits: Limits) -> Result:
    """Trains one side until it ends, and evaluates it on `ids` meanwhile."""
    on_gpu, clock, result = ids.device.type == "cuda", Clock(ids.device), Result()
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result.memory = -torch.cuda.memory_allocated()
    side = make(clock)
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
        print(f"{seconds:.1f} s, {result.steps} steps, {loss:.4f}", file=sys.stderr)
        if loss <= limits.target:
            result.reached_s = seconds
        due = max(due, seconds // limits.interval * limits.interval) + limits.interval
    result.seconds = clock()
    result.chars_per_s = result.steps * side.chars_per_step / result.seconds
    if result.memory is not None:
        result.memory += torch.cuda.max_memory_allocated()
    return result
