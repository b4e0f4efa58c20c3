"""Collectives other than gradients and evaluation sums: errors, stop signals, the clock.

They run over gloo between hosts, so they never wait for a GPU.
"""

import datetime
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from numpy.typing import NDArray

from charrnn.errors import CharRNNError, TrainingError

T = TypeVar("T")

_MAX_RANKS_REPORTED = 4
# Ranks may wait for hours while one prepares a corpus; a lost peer is detected by the watchdog.
_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class StepStatus:
    """What a rank reports before a step.

    Attributes:
        stop_signal: Stop signal it received, 0 for none.
        failed: Whether it has an error to raise.
        elapsed_s: Its clock, seconds of the run; rank 0's is used by all.
        starts: (B,) where the windows of the global batch begin, as it computed them.
    """

    stop_signal: int
    failed: bool
    elapsed_s: float
    starts: NDArray[np.int64]

    def pack(self) -> torch.Tensor:
        """(4,) int64: signal, failed, clock in microseconds, CRC-32 of the starts."""
        clock, checksum = round(self.elapsed_s * 1e6), zlib.crc32(self.starts.tobytes())
        return torch.tensor([self.stop_signal, int(self.failed), clock, checksum])


@dataclass(frozen=True)
class GlobalStatus:
    """The status of all ranks, identical on each.

    Attributes:
        stop_signal: The first stop signal by rank order, 0 for none.
        elapsed_s: Rank 0's clock.
        failed_ranks: Ranks that have an error.
        mismatched_ranks: Ranks whose batch is not rank 0's.
    """

    stop_signal: int
    elapsed_s: float
    failed_ranks: tuple[int, ...]
    mismatched_ranks: tuple[int, ...]


class Collectives:
    """Collective operations over the run's processes. With a single process nothing is communicated."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main, self.is_local_main = accelerator.is_main_process, accelerator.is_local_main_process
        self._group: Any = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def all_gather_status(self, status: StepStatus) -> GlobalStatus:
        """Combine the status of all ranks."""
        if self.world_size == 1:
            failed = (0,) if status.failed else ()
            return GlobalStatus(status.stop_signal, round(status.elapsed_s, 6), failed, ())
        mine = status.pack()  # (4,)
        everyone = mine.expand(self.world_size, -1).clone()  # (world, 4)
        dist.all_gather(list(everyone.unbind()), mine, group=self._group)
        signals, failures, clocks, batches = everyone.T.tolist()
        return GlobalStatus(
            stop_signal=next((s for s in signals if s), 0),
            elapsed_s=clocks[0] / 1e6,
            failed_ranks=tuple(r for r, failed in enumerate(failures) if failed),
            mismatched_ranks=tuple(r for r, batch in enumerate(batches) if batch != batches[0]),
        )

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.all_gather(None)

    def raise_if_any(self, error: CharRNNError | None) -> None:
        """Raise on every rank, with the same message, if any rank has an `error`."""
        errors = [(rank, e) for rank, e in enumerate(self.all_gather(error)) if e]
        if not errors:
            return
        kind = type(errors[0][1])
        if errors[0][0] == 0:
            raise kind(str(errors[0][1]))
        raise kind("; ".join(f"rank {rank}: {e}" for rank, e in errors[:_MAX_RANKS_REPORTED]))

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; a user error of one is raised on all."""
        result, error = _attempt(action)
        self.raise_if_any(error)
        return result  # type: ignore[return-value]

    def local_main_first(self, action: Callable[[], T]) -> T:
        """Run `action` on one rank of each machine, then on the others, which find its work done."""
        result, error = _attempt(action) if self.is_local_main else (None, None)
        self.raise_if_any(error)
        if not self.is_local_main:
            result, error = _attempt(action)
        self.raise_if_any(error)
        return result  # type: ignore[return-value]


def _attempt(action: Callable[[], T]) -> tuple[T | None, CharRNNError | None]:
    try:
        return action(), None
    except CharRNNError as error:
        return None, error


def check_same_batch(status: GlobalStatus, step: int) -> None:
    """Raise a TrainingError if ranks computed different windows for step number `step`."""
    if status.mismatched_ranks:
        raise TrainingError(
            f"batch mismatch at step {step}: rank(s) {', '.join(map(str, status.mismatched_ranks))} and rank 0 would "
            "train on different windows; use the same charrnn version, config and text on every machine, then rerun "
            "the same command"
        )
