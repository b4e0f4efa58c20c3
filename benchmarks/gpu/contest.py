"""Seconds of training to a loss on one device: our trainer, the transformer, and the clock that both are under.

After every interval of training a side is evaluated on the complete validation split by the `windows` protocol, in
fp32: each window of 256 characters from a zero state. The clock of a side runs while it trains, its first step
included, and stops while it is evaluated. A target counts as reached at the evaluation that finds it, so seconds are
exact to an interval. A side ends there, at its schedule's end, or at a limit.
"""

import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.results import Value
from benchmarks.gpu.transformer import Recipe, Shape, Transformer
from benchmarks.training import make_trainer
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
    """A contestant. chars_per_step: of a training step. compile_s: seconds of compilation before the clock starts."""

    chars_per_step: int
    model: nn.Module
    compile_s: float | None

    def train_step(self) -> bool:
        """Takes one step; returns False, and takes none, at the schedule's end."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Maps (R, T) to (R, T, V), each row from a zero state."""
        ...


class Ours:
    """The product's trainer with a config's schedule, without checkpoints."""

    compile_s: float | None = None

    def __init__(self, config: RunConfig, clock: Clock) -> None:
        self.trainer = make_trainer(config, clock=clock)
        self.model: Any = self.trainer.model
        self.chars_per_step = config.data.batch_size * config.data.seq_len

    def train_step(self) -> bool:
        """Takes one step, and logs when it is due."""
        if not self.trainer.next_step():
            return False
        self.trainer.train_step()
        if self.trainer.schedule.log_due():
            self.trainer.log()
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Computes them from a zero state."""
        return self.model(ids, self.model.zero_state(len(ids), ids.device))[0]


class Reference:
    """The transformer: in bf16 on a GPU; compiled, if wanted, before the clock starts."""

    compile_s: float | None = None

    def __init__(
        self, shape: Shape, recipe: Recipe, corpus: Corpus, device: torch.device, *, compiled: bool = False
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.context, self.step = recipe, shape.context, 0
        self._ids, self._random = IdSource(corpus.train, device), np.random.default_rng(recipe.seed)
        self.model: nn.Module = Transformer(shape, len(corpus.vocab)).to(device)
        self.chars_per_step = recipe.batch_size * shape.context
        decayed: list[nn.Parameter] = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, fused=True)
        self._network: Callable[[Tensor], Tensor] = self.model
        if compiled:
            self._compile(device)

    def _compile(self, device: torch.device) -> None:
        began = time.perf_counter()
        # Without a GPU the checks are rehearsed, and C++ that is compiled for it would take minutes.
        self._network = torch.compile(self.model, backend="inductor" if device.type == "cuda" else "aot_eager")
        for _ in range(2):
            self._loss().backward()
        self._optimizer.zero_grad()
        self.compile_s = time.perf_counter() - began
        # From the beginning again: windows and dropout masks.
        self._random = np.random.default_rng(self.recipe.seed)
        torch.manual_seed(self.recipe.seed)

    def _loss(self) -> Tensor:
        """Of the next windows, (), in nats/char."""
        starts = self._random.integers(0, len(self._ids) - self.context, self.recipe.batch_size)  # (B,)
        window = self._ids.windows(starts, self.context + 1)  # (B, T + 1)
        device = window.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = self._network(window[:, :-1])  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    def train_step(self) -> bool:
        """Takes one step, unless the recipe's last was taken."""
        if self.step >= self.recipe.steps:
            return False
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.lr(self.step)
        self._loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return True

    def logits(self, ids: Tensor) -> Tensor:
        """Computes them for each window by itself."""
        return self.model(ids)


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


def race(make: Callable[[Clock], Side], ids: IdSource, window: int, limits: Limits) -> Value:
    """Trains one side until it ends, and evaluates it on `ids` meanwhile.

    Returns:
        seconds, chars_per_s: of training. reached_s: None = not reached. memory: peak bytes on a GPU. curve: up to 40
        of its (seconds, nats/char). steps, best, best_s, compile_s.
    """
    on_gpu, clock, memory = ids.device.type == "cuda", Clock(ids.device), 0
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory = torch.cuda.memory_allocated()
    side = make(clock)
    side.model.train()
    steps, curve, due, ended = 0, [(0.0, math.inf)], limits.interval, False
    while not ended and curve[-1][1] > limits.target:
        clock.start()
        while True:
            ended = not side.train_step()
            steps += not ended
            ended = ended or steps == limits.steps or clock() >= limits.seconds
            if ended or clock() >= due:
                break
        clock.stop()
        curve.append((clock(), windows_loss(side, ids, window)))
        print(f"{curve[-1][0]:.1f} s, {steps} steps, {curve[-1][1]:.4f}", file=sys.stderr)
        due = max(due, clock() // limits.interval * limits.interval) + limits.interval
    best_s, best = min(curve, key=lambda point: point[1])
    return {
        "seconds": clock(),
        "chars_per_s": steps * side.chars_per_step / clock(),
        "reached_s": clock() if curve[-1][1] <= limits.target else None,
        "memory": torch.cuda.max_memory_allocated() - memory if on_gpu else None,
        "steps": steps,
        "best": best,
        "best_s": best_s,
        "curve": [(round(s, 2), round(loss, 4)) for s, loss in curve[1 :: -(-len(curve) // 40)]],
        "compile_s": side.compile_s,
    }
