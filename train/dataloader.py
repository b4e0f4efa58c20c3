"""A run's batches: how many there are, and from window starts to tensors where the model is."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charrnn.config import RunConfig
from charrnn.data.corpus import check_ids
from charrnn.errors import TrainingError
from charrnn.io import forget_pages
from charrnn.vocab import Ids
from charrnn.windows import WindowPlan

_MOST_RESIDENT = 64 << 20  # bytes of a memory-mapped file
_FAULT_AROUND = 64 << 10  # bytes that Linux maps around each place that is read


class IdSource:
    """One split's ids, and the windows read from it.

    On a CPU the ids stay memory-mapped, and the memory that reading them takes is given back every few MB. On an
    accelerator they are copied there once, and the gather runs there: no worker processes, no copy a step.
    """

    def __init__(
        self,
        ids: Ids,
        device: torch.device,
        table: NDArray[np.int64] | None = None,
        num_symbols: int = 1 << 32,
    ) -> None:
        """ids: (N,), each below num_symbols. table: (V_corpus,) the model's id for each, when its vocabulary differs.

        Raises: CorpusError where an id is not below num_symbols, here or when it is read.
        """
        self._num_symbols = num_symbols if table is None else len(table)
        self.device = device
        self._host = ids
        self._touched = 0
        self._table = table
        self._resident: Tensor | None = None
        if device.type != "cpu":
            # torch indexes 8-bit ids as they are; its wider unsigned types lack kernels.
            check_ids(ids, self._num_symbols)
            mapped = ids if table is None else table[ids]
            compact = mapped.astype(np.uint8 if mapped.dtype == np.uint8 else np.int32)
            self._resident = torch.from_numpy(compact).to(device)

    def __len__(self) -> int:
        return len(self._host)

    def windows(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """(R, length) int64: `length` characters from each of `starts` (R,). Past the end the last one repeats."""
        index = np.minimum(starts[:, None] + np.arange(length), len(self) - 1)  # (R, length)
        if self._resident is not None:
            return self._resident[torch.from_numpy(index).to(self.device, non_blocking=True)].long()
        ids = self._host[index].astype(np.int64)
        check_ids(ids, self._num_symbols, self._host)
        self._touched += len(starts) * (length * self._host.itemsize + _FAULT_AROUND)
        if self._touched > _MOST_RESIDENT:
            forget_pages(self._host)
            self._touched = 0
        return torch.from_numpy(ids if self._table is None else self._table[ids])


def check_inside(starts: NDArray[np.int64], length: int, num_chars: int, step: int) -> None:
    """Raises: TrainingError when a window of `length` from one of `starts` (R,) leaves the text of `num_chars`."""
    low, high = int(starts.min(initial=0)), int(starts.max(initial=0)) + length
    if low < 0 or high > num_chars:
        raise TrainingError(
            f"the batch of step {step + 1} wants characters {low} to {high} of {num_chars}: an index is corrupted; "
            "run the same command again, which goes on from the newest checkpoint, and test the machine's memory if "
            "it happens again"
        )


def window_plan(config: RunConfig, num_chars: int) -> WindowPlan:
    """The training batches of `config` over a split of `num_chars` characters. Raises: CorpusError if too small."""
    data = config.data
    return WindowPlan(
        num_chars, data.seq_len, data.batch_size, data.windows, data.stride, config.train.seed, data.reset
    )


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Updates of the whole run by epochs and max_steps, whichever is less; 0 when only time limits it."""
    by_epochs = max(1, math.ceil(config.train.epochs * steps_per_epoch)) if config.train.epochs else 0
    limits = [n for n in (by_epochs, config.train.max_steps) if n]
    return min(limits, default=0)
