"""Collectives other than gradients and evaluation sums: errors, stop signals, the clock.

They run over gloo between hosts, so they never wait for a GPU.
"""

import datetime
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from numpy.typing import NDArray

from charrnn.errors import CharRNNError

T = TypeVar("T")

_MAX_RANKS_REPORTED = 4
# Ranks may wait for hours while one prepares a corpus; a lost peer is detected by the watchdog.
_TIMEOUT = datetime.timedelta(days=1)


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

    def all_gather_status(
        self, stop_signal: int, failed: bool, elapsed_s: float, starts: NDArray[np.int64]
    ) -> GlobalStatus:
        """Combine what the ranks report before a step.

        Args:
            stop_signal: Stop signal that this rank received, 0 for none.
            failed: Whether it has an error to raise.
            elapsed_s: Its clock, seconds of the run.
            starts: (B,) where the windows of the global batch begin, as it computed them.
        """
        everyone = [pack_status(stop_signal, failed, elapsed_s, starts)]
        if self.world_size > 1:
            mine = torch.tensor(everyone[0])  # (4,)
            gathered = mine.expand(self.world_size, -1).clone()  # (world, 4)
            dist.all_gather(list(gathered.unbind()), mine, group=self._group)
            everyone = gathered.tolist()
        signals, failures, clocks, batches = zip(*everyone, strict=True)
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


def pack_status(stop_signal: int, failed: bool, elapsed_s: float, starts: NDArray[np.int64]) -> Sequence[int]:
    """Four integers: signal, failed, clock in microseconds, CRC-32 of the starts."""
    return stop_signal, int(failed), round(elapsed_s * 1e6), zlib.crc32(starts.tobytes())
