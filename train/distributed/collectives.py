"""Collectives other than gradients and evaluation sums: errors, stop signals, the clock.

They run over gloo between hosts, so they never wait for a GPU.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from charrnn.errors import CharRNNError

T = TypeVar("T")

_MAX_RANKS_REPORTED = 4
# Ranks may wait for hours while one prepares a corpus; a lost peer is detected by the watchdog.
_TIMEOUT = datetime.timedelta(days=1)


class Collectives:
    """Collective operations over the run's processes. With a single process nothing is communicated."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main, self.is_local_main = accelerator.is_main_process, accelerator.is_local_main_process
        self._group: Any = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def all_gather_integers(self, mine: Sequence[int]) -> list[list[int]]:
        """Every rank's integers of 64 bits, in rank order: faster than `all_gather`, for every step."""
        if self.world_size == 1:
            return [list(mine)]
        own = torch.tensor(mine)  # (N,)
        gathered = own.expand(self.world_size, -1).clone()  # (world, N)
        dist.all_gather(list(gathered.unbind()), own, group=self._group)
        return gathered.tolist()

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
