"""What the ranks of a run tell each other besides gradients and evaluation sums: faults, stops, the clock.

Everything travels between hosts, over gloo: a GPU is never waited for.
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

_RANKS_TOLD_OF = 4
# Some ranks may wait for hours while another prepares a corpus; that they are alive is the watchdog's business.
_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Notice:
    """What one rank says ahead of an update.

    stop: the signal it was sent, 0 for none. fault: whether it met an error. elapsed_s: the run's clock, of which rank
    0's is everybody's. batch: the windows that it takes the global batch to be made of, (B,).
    """

    stop: int
    fault: bool
    elapsed_s: float
    batch: NDArray[np.int64]

    def packed(self) -> torch.Tensor:
        """(4,) int64: the clock in microseconds, the batch as its CRC-32."""
        return torch.tensor([self.stop, int(self.fault), round(self.elapsed_s * 1e6), zlib.crc32(self.batch.tobytes())])


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after an exchange, the same on each.

    stop: the first signal that any was sent, 0 for none. faulty: the ranks that met an error. odd_batch: those whose
    batch is not rank 0's.
    """

    stop: int
    elapsed_s: float
    faulty: tuple[int, ...]
    odd_batch: tuple[int, ...]


class Ranks:
    """The run's processes, as one of them sees the others. With a single process nothing is exchanged."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main, self.is_local_main = accelerator.is_main_process, accelerator.is_local_main_process
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def exchange(self, notice: Notice) -> Agreed:
        """Gives this rank's notice, and returns what all ranks gave."""
        mine = notice.packed()  # (4,)
        everyone = mine.expand(self.count, -1).clone()  # (ranks, 4)
        if self.count > 1:
            dist.all_gather(list(everyone.unbind()), mine, group=self._group)
        stops, faults, clocks, batches = everyone.T.tolist()
        return Agreed(
            stop=next((s for s in stops if s), 0),
            elapsed_s=clocks[0] / 1e6,
            faulty=tuple(r for r, fault in enumerate(faults) if fault),
            odd_batch=tuple(r for r, batch in enumerate(batches) if batch != batches[0]),
        )

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Returns once every rank has come here."""
        self.gather(None)

    def raise_together(self, error: CharRNNError | None) -> None:
        """Raises on every rank when any of them has an `error`: all at once, and with the same words."""
        errors = [(rank, e) for rank, e in enumerate(self.gather(error)) if e]
        if not errors:
            return
        kind = type(errors[0][1])
        if errors[0][0] == 0:
            raise kind(str(errors[0][1]))
        raise kind("; ".join(f"process {rank}: {e}" for rank, e in errors[:_RANKS_TOLD_OF]))

    def together(self, action: Callable[[], T]) -> T:
        """`action` on every rank; where it fails on one, it fails on all of them."""
        result, error = _attempt(action)
        self.raise_together(error)
        return result  # type: ignore[return-value]

    def locally_first(self, action: Callable[[], T]) -> T:
        """`action` on one rank of each machine, and then on the others, which find its work done."""
        result, error = _attempt(action) if self.is_local_main else (None, None)
        self.raise_together(error)
        if not self.is_local_main:
            result, error = _attempt(action)
        self.raise_together(error)
        return result  # type: ignore[return-value]


def _attempt(action: Callable[[], T]) -> tuple[T | None, CharRNNError | None]:
    try:
        return action(), None
    except CharRNNError as error:
        return None, error


def check_same_batch(agreed: Agreed, step: int) -> None:
    """Raises: TrainingError when ranks took update number `step` to be made of other windows than rank 0 did."""
    if agreed.odd_batch:
        raise TrainingError(
            f"process(es) {', '.join(map(str, agreed.odd_batch))} would train on other windows than process 0 at step "
            f"{step}; give every machine the same charrnn, config and text, then run the same command again"
        )
