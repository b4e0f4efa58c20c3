"""A run's batches: how many there are, and from window starts to tensors where the model is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charrnn.config import RunConfig
from charrnn.data.corpus import Corpus, check_ids
from charrnn.errors import TrainingError
from charrnn.io import release_pages
from charrnn.vocab import Ids, Vocab
from charrnn.windows import Batch, WindowPlan

_MOST_RESIDENT = 64 << 20  # bytes of a memory-mapped file
_FAULT_AROUND = 64 << 10  # bytes that Linux maps around each place that is read
# K of the teachers' probabilities, and V up to which all are stored, which takes little more than K with their ids.
MOST_KEPT, MOST_DENSE = 64, 128
_COPIED_AT_ONCE = 16 << 20  # ids that cross to a device at once


class IdSource:
    """One split's ids, and the windows read from it.

    On a CPU the ids stay memory-mapped, and the pages that were read are released every 64 MiB. On an
    accelerator they are copied there once, and the gather runs there: no worker processes, and only the windows' starts
    cross at each step. Ids that would take more than half of a GPU's free memory stay on the host.

    Attributes:
        device: Where `windows` returns tensors.
        is_resident: Whether the ids lie on the accelerator.
    """

    def __init__(
        self,
        ids: Ids,
        device: torch.device,
        table: NDArray[np.int64] | None = None,
        num_symbols: int = 1 << 32,
    ) -> None:
        """Copy the ids to an accelerator where they fit.

        Args:
            ids: (N,), each below num_symbols.
            device: Where the model is.
            table: (V_corpus,), the model's id for each of the corpus's, when its vocabulary differs.
            num_symbols: V_corpus where there is no table.

        Raises:
            CorpusError: An id is not below num_symbols, here or when it is read.
        """
        self._num_symbols = num_symbols if table is None else len(table)
        self.device = device
        self._host = ids
        self._touched = 0
        self._table = table
        self._ids: Tensor | None = None
        narrow = _narrowest(ids.dtype, table)
        if device.type != "cpu" and _fits(len(ids) * narrow.itemsize, device):
            self._ids = self._copied(narrow)

    def __len__(self) -> int:
        return len(self._host)

    @property
    def is_resident(self) -> bool:
        """Whether the ids lie on the accelerator."""
        return self._ids is not None

    def windows(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """Windows of `length` ids from each of `starts` (R,): (R, length) int64. Past the end the last id repeats."""
        if self._ids is not None:
            return self.gather(to_device(starts, self.device), length)
        index = np.minimum(starts[:, None] + np.arange(length), len(self) - 1)  # (R, length)
        ids = self._host[index].astype(np.int64)
        check_ids(ids, self._num_symbols, self._host)
        self._touched += len(starts) * (length * self._host.itemsize + _FAULT_AROUND)
        if self._touched > _MOST_RESIDENT:
            release_pages(self._host)
            self._touched = 0
        return to_device(ids if self._table is None else self._table[ids], self.device)

    def gather(self, starts: Tensor, length: int) -> Tensor:
        """`windows` for starts (R,) on the accelerator that holds the ids, without a host synchronization."""
        assert self._ids is not None
        offsets = torch.arange(length, device=self.device)
        index = (starts[:, None] + offsets).clamp_(max=len(self) - 1)  # (R, length)
        window = self._ids[index].long()
        return window.bitwise_and_(0xFFFF) if self._ids.dtype == torch.int16 else window

    def _copied(self, narrow: np.dtype) -> Tensor:
        """The ids on the device, (N,), in `narrow`, a block at a time: the host never holds them all."""
        # torch gathers 8-bit ids as they are; its wider unsigned types lack kernels, and their bits travel as signed.
        signed = {1: np.uint8, 2: np.int16, 4: np.int32}[narrow.itemsize]
        copied = torch.empty(len(self), dtype=torch.from_numpy(np.empty(0, signed)).dtype, device=self.device)
        for begin in range(0, len(self), _COPIED_AT_ONCE):
            part = self._host[begin : begin + _COPIED_AT_ONCE]
            check_ids(part, self._num_symbols, self._host)
            compact = (part if self._table is None else self._table[part]).astype(narrow)  # a copy, which torch may own
            copied[begin : begin + len(part)].copy_(torch.from_numpy(compact.view(signed)))
            release_pages(self._host)
        return copied


class TargetSource:
    """The teachers' probabilities of the next character after each position of a split, memory-mapped.

    Attributes:
        teachers: SHA-256 of each one's weights.
    """

    def __init__(
        self, rows: NDArray[np.void], num_symbols: int, device: torch.device, teachers: tuple[str, ...]
    ) -> None:
        """rows: (N,) of `target_dtype`. num_symbols: V. device: where `windows` returns tensors."""
        self.teachers = teachers
        self._rows, self._num_symbols, self._device = rows, num_symbols, device
        self._touched = 0

    def windows(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """Probabilities after `length` positions from each of `starts` (R,): (R, length, V) float16."""
        rows = self._rows[starts[:, None] + np.arange(length)]  # (R, length)
        self._touched += rows.nbytes + len(starts) * _FAULT_AROUND
        if self._touched > _MOST_RESIDENT:
            release_pages(self._rows)
            self._touched = 0
        kept = to_device(rows["probabilities"].copy(), self._device)  # (R, length, K)
        if "kept" not in (rows.dtype.names or ()):
            return kept
        ids = to_device(rows["kept"].astype(np.int64), self._device)  # (R, length, K)
        return kept.new_zeros(*ids.shape[:2], self._num_symbols).scatter_(2, ids, kept)


def target_dtype(num_symbols: int) -> np.dtype:
    """A position's row of targets: its id, and the next character's probabilities.

    These are all V, or with a large vocabulary the K largest, with their ids in `kept`.
    """
    narrow = np.min_scalar_type(num_symbols - 1).newbyteorder("<")
    if num_symbols <= MOST_DENSE:
        return np.dtype([("id", narrow), ("probabilities", "<f2", (num_symbols,))])
    return np.dtype([("id", narrow), ("probabilities", "<f2", (MOST_KEPT,)), ("kept", narrow, (MOST_KEPT,))])


def generated_shape(config: RunConfig) -> tuple[int, int]:
    """Rows, and characters of each, of the text that the teachers generate: distill.generated characters or less."""
    rows = max(1, min(512, config.distill.generated // 1024))
    return rows, config.distill.generated // rows


def num_trained(config: RunConfig, corpus: Corpus) -> int:
    """Characters of a pass: those of the training split, and the teachers'."""
    rows, length = generated_shape(config)
    return len(corpus.train) + rows * length


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`; on a GPU by pinned memory, so that the host need not wait for the copy."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _narrowest(ids: np.dtype, table: NDArray[np.int64] | None) -> np.dtype:
    """The smallest unsigned type for the ids that the model reads."""
    return ids if table is None else np.min_scalar_type(int(table.max(initial=0)))


def _fits(num_bytes: int, device: torch.device) -> bool:
    """Whether so much of a split may lie on the device: at most half of what is free, for the model comes after it."""
    return device.type != "cuda" or num_bytes <= torch.cuda.mem_get_info(device)[0] // 2


@dataclass(frozen=True)
class TrainingData:
    """A run's splits, and this rank's part of each batch.

    Attributes:
        corpus: Where the splits come from.
        vocab: The model's, which the corpus's may differ from.
        train: Training split, followed by what the teachers generated.
        val: Validation split.
        plan: Batches of `train`.
        rows: This rank's rows of a batch.
        targets: The teachers' probabilities on `train`; None without teachers.
    """

    corpus: Corpus
    vocab: Vocab
    train: IdSource
    val: IdSource
    plan: WindowPlan
    rows: slice
    targets: TargetSource | None = None

    def read(self, step: int) -> tuple[Batch, Tensor, Tensor | None]:
        """The global batch of step number `step` (from 0), and this rank's part of it.

        Returns:
            The batch, windows (B / world, T + 1), and with teachers their probabilities (B / world, T, V).

        Raises:
            TrainingError: A window leaves the text.
        """
        batch = self.plan.batch(step)
        starts = batch.starts[self.rows]  # (B / world,)
        check_inside(starts, self.plan.seq_len + 1, len(self.train), step)
        targets = self.targets.windows(starts, self.plan.seq_len) if self.targets else None
        return batch, self.train.windows(starts, self.plan.seq_len + 1), targets


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
        num_chars,
        data.seq_len,
        data.batch_size,
        data.windows,
        data.stride,
        config.train.seed,
        data.reset,
        data.segment,
    )
