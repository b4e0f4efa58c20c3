"""The metrics of training steps, kept on the device until a record is due: no step waits for a copy to the host."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from train.loop.errors import check_finite, check_skipped


class Metrics:
    """Learning rate, loss and gradient norm of the steps since the last record, and the speed.

    Attributes:
        latest: The newest value of each metric, the evaluations' too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        *,
        chars_per_step: int = 1,
        flops_per_char: int = 0,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing measured.

        Args:
            accelerator: The ranks, over which losses are averaged.
            run_dir: For messages.
            chars_per_step: Characters of a global batch.
            flops_per_char: FLOPs of training on one.
            peak_flops: FLOP/s that all devices do at best; None when that is not known.
            clock: Seconds.
        """
        self.latest: dict[str, float] = {}
        self._accelerator, self._run_dir, self._clock = accelerator, run_dir, clock
        self._chars_per_step, self._flops_per_char, self._peak_flops = chars_per_step, flops_per_char, peak_flops
        self._pending: list[tuple[float, Tensor, Tensor]] = []  # loss and norm on the device
        self._fetched: list[tuple[float, float, float]] = []
        self._skipped = 0  # steps in a row, up to the latest, that the loss scaler has skipped
        self._since = clock()

    def start(self) -> None:
        """Measure the speed from now on."""
        self._since = self._clock()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Keep the block's time out of the speed: it is no training."""
        began = self._clock()
        yield
        self._since += self._clock() - began

    def add(self, lr: float, loss: Tensor, norm: Tensor) -> None:
        """Note a step. loss: this rank's, () float32. norm: the global gradient's, () float32."""
        self._pending.append((lr, loss, norm))

    def fetch(self, step: int) -> None:
        """Copy what is pending to the host, all at once.

        Args:
            step: Number of the latest step.

        Raises:
            TrainingError: A loss or gradient norm of some rank is not finite; on every rank.
        """
        if not self._pending:
            return
        lrs, losses, norms = zip(*self._pending, strict=True)
        self._pending.clear()
        values = torch.stack([*losses, *norms]).float()  # (2 n,)
        if self._accelerator.num_processes > 1:
            values = self._accelerator.reduce(values, "mean")
        losses, norms = values.view(2, -1).tolist()
        # Under fp16 an infinite gradient is the loss scaler's business: it skips that step and lowers the scale.
        check_finite(step, lrs, losses, None if self._accelerator.scaler else norms, self._run_dir)
        for norm in norms:
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        check_skipped(step, self._skipped, self._run_dir)
        self._fetched += zip(lrs, losses, norms, strict=True)

    def last_norm(self) -> float:
        """The gradient norm of the latest fetched step; infinite when the loss scaler has skipped it."""
        return self._fetched[-1][2]

    def take(self) -> dict[str, float]:
        """The metrics of the steps that were fetched since the last call; empty without one."""
        count = len(self._fetched)
        if not count:
            return {}
        lrs, losses, norms = zip(*self._fetched, strict=True)
        self._fetched.clear()
        now, mean = self._clock(), sum(losses) / count
        chars_per_s = count * self._chars_per_step / max(now - self._since, 1e-9)
        self._since = now
        values = {"train/loss": mean, "train/bpc": mean / math.log(2), "train/lr": lrs[-1]}
        # That of the latest step that was made: a skipped one has none that JSON could hold.
        if made := [norm for norm in norms if math.isfinite(norm)]:
            values["train/grad_norm"] = made[-1]
        flops = chars_per_s * self._flops_per_char
        values |= {"train/chars_per_s": chars_per_s, "train/gflops": flops / 1e9}
        if self._peak_flops:
            values["train/mfu"] = flops / self._peak_flops
        self.latest |= values
        return values


class CpuShare:
    """The share of its threads' time that this process has had on the cores since it was started."""

    def __init__(self) -> None:
        self._cpu_began, self._wall_began = time.process_time(), time.perf_counter()

    def __call__(self) -> float:
        """0 to 1."""
        wall = time.perf_counter() - self._wall_began
        return (time.process_time() - self._cpu_began) / max(wall * torch.get_num_threads(), 1e-9)
