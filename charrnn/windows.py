"""Training batches as a function of (seed, step), and the batches of both evaluation protocols: index arithmetic.

Letters: N characters in a split, T seq_len, B batch_size (global), R rows of an evaluation batch.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import CorpusError

Index = NDArray[np.int64]
SPLITS = ("train", "val", "test")


def split_bounds(num_chars: int, fractions: tuple[float, float, float]) -> dict[str, tuple[int, int]]:
    """Return the [start, stop) of the contiguous train, val and test splits of `num_chars` characters.

    A boundary lies at floor(N * fraction), where nanoGPT's data/shakespeare_char/prepare.py puts it.
    """
    train_end = int(num_chars * fractions[0])
    total = fractions[0] + fractions[1]
    val_end = num_chars if abs(total - 1.0) < 1e-9 else int(num_chars * total)
    return {"train": (0, train_end), "val": (train_end, val_end), "test": (val_end, num_chars)}


@dataclass(frozen=True)
class Batch:
    """A global training batch: row b is the characters starts[b] .. starts[b] + T (T + 1 of them).

    Attributes:
        starts: (B,) index of each row's first character.
        reset: (B,) whether the row starts from a zero state; the others continue the previous batch's.
    """

    starts: Index
    reset: NDArray[np.bool_]


@dataclass(frozen=True)
class WindowPlan:
    """The training batches of a split, as a pure function of (seed, step).

    Every epoch begins at its own offset into the text, so that window boundaries differ.

    Attributes:
        num_chars: N.
        seq_len: T.
        batch_size: B, global.
        windows: `sliding` (windows at a stride, shuffled every epoch) or `carry` (B contiguous rows, whose state is
            carried from window to window).
        stride: Characters between sliding windows; 0 = seq_len.
        seed: Of offsets, shuffling and resets.
        reset: Probability of resetting a carried row's state at a window boundary.
        segment: Length in characters of the segments that carried rows are cut into. They are shuffled every epoch, and
            the hidden state is reset at the start of each. 0 = contiguous rows.
    """

    num_chars: int
    seq_len: int
    batch_size: int
    windows: Literal["sliding", "carry"]
    stride: int
    seed: int
    reset: float = 0.0
    segment: int = 0

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise CorpusError(self._too_small_message())

    @property
    def _slack(self) -> int:
        return self.num_chars - (self.seq_len + 1)

    @property
    def _step_chars(self) -> int:
        """Distance between neighbouring windows, in characters."""
        return self.seq_len if self.windows == "carry" else (self.stride or self.seq_len)

    @property
    def _max_offset(self) -> int:
        return _max_offset(self._slack, self._step_chars)

    @property
    def _row_chars(self) -> int:
        return (self.num_chars - 1 - self._max_offset) // self.batch_size

    @property
    def _segments(self) -> int:
        """Segments of a row."""
        return max(1, self._row_chars // max(self.seq_len, self.segment)) if self.segment else 1

    @property
    def _segment_chars(self) -> int:
        return self._row_chars // self._segments

    @property
    def _segment_windows(self) -> int:
        return self._segment_chars // self.seq_len

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows that an epoch draws from."""
        if self._slack < 0:
            return 0
        if self.windows == "carry":
            return self._segment_windows * self._segments * self.batch_size
        return (self._slack - self._max_offset) // self._step_chars + 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete batches in an epoch; the remaining windows, others in every epoch, are dropped."""
        return self.windows_per_epoch // self.batch_size

    def batch(self, step: int) -> Batch:
        """Return the batch of a step (from 0)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        offset = self._offset(epoch)
        if self.windows == "carry":
            segment, window = divmod(k, self._segment_windows)
            places = np.arange(self.batch_size, dtype=np.int64)  # (B,)
            if self._segments > 1:
                places = _places(self.seed, epoch, segment, self.batch_size, self._segments * self.batch_size)
            starts = offset + places * self._segment_chars + window * self.seq_len
            return Batch(starts, self._resets(epoch, k, first=window == 0))
        places = _places(self.seed, epoch, k, self.batch_size, self.windows_per_epoch)  # (B,)
        return Batch(offset + places * self._step_chars, np.ones(self.batch_size, bool))

    def _resets(self, epoch: int, k: int, *, first: bool) -> NDArray[np.bool_]:
        """Return (B,): all rows at the first window of a segment, and random ones at each later window k."""
        if first or not self.reset:
            return np.full(self.batch_size, first)
        return np.random.default_rng([self.seed, epoch, k]).random(self.batch_size) < self.reset

    def _offset(self, epoch: int) -> int:
        return int(_random_words(self.seed, epoch)[0]) % (self._max_offset + 1)

    def _too_small_message(self) -> str:
        what = (
            f"the training split has {self.num_chars} characters: too few for batch_size {self.batch_size} "
            f"x seq_len {self.seq_len} ({self.windows} windows)"
        )
        for seq_len in (self.seq_len, 64, 32, 16, 8):
            most = largest_batch(self.num_chars, seq_len, self.windows, self.stride)
            if most and seq_len <= self.seq_len:
                return (
                    f"{what}; --set data.seq_len={seq_len} --set data.batch_size={most} would fit, or use a longer text"
                )
        return f"{what}; use a longer text"


def largest_batch(num_chars: int, seq_len: int, windows: Literal["sliding", "carry"], stride: int) -> int:
    """Return the largest batch_size for which an epoch has one batch; 0 when not even one window fits."""
    slack = num_chars - (seq_len + 1)
    if slack < 0:
        return 0
    step_chars = seq_len if windows == "carry" else (stride or seq_len)
    offset = _max_offset(slack, step_chars)
    return (num_chars - 1 - offset) // seq_len if windows == "carry" else (slack - offset) // step_chars + 1


def _max_offset(slack: int, step_chars: int) -> int:
    """Return the largest offset at which an epoch begins: less than one window, at most half of the slack."""
    return max(0, min(step_chars - 1, slack // 2))


_ROUNDS = 6


@functools.lru_cache(maxsize=4)
def _random_words(seed: int, epoch: int) -> NDArray[np.uint64]:
    """(1 + rounds,) words of an epoch: drawn once, where they would take a twentieth of a small model's step."""
    return np.random.SeedSequence([seed, epoch]).generate_state(1 + _ROUNDS, np.uint64).astype(np.uint64)


@functools.lru_cache(maxsize=4)
def _places(seed: int, epoch: int, k: int, batch_size: int, count: int) -> Index:
    """Return (B,): the k-th B of the epoch's permutation of range(count), cached for a segment's windows."""
    positions = np.arange(k * batch_size, (k + 1) * batch_size, dtype=np.uint64)  # (B,)
    return permute(positions, count, _random_words(seed, epoch)[1:]).astype(np.int64)


def permute(positions: NDArray[np.uint64], count: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Map positions to their places in a pseudo-random permutation of range(count), without storing one.

    A Feistel network over the next even power of two, iterated until it lands below `count` (cycle walking: Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        positions: (B,) below `count`.
        count: Length of the permutation.
        keys: (rounds,) round keys.

    Returns:
        (B,) places.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = positions.copy()
    walking = np.ones(out.shape, bool)
    while walking.any():
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        out[walking] = (left << half) | right
        walking = out >= count
    return out


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    z = values ^ key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def rank_slice(rows: int, rank: int, world_size: int) -> slice:
    """Return the contiguous rows of a global batch that belong to `rank`; shares differ by at most one."""
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


@dataclass(frozen=True)
class EvalBatch:
    """Rows of `length` characters to predict from, each starting from a zero state.

    Attributes:
        starts: (R,) index of each row's first character.
        length: Characters of a row.
        counted: (R, length) where the prediction of the next character enters the loss; the rest is warm-up, or lies
            past the end of the split.
    """

    starts: Index
    length: int
    counted: NDArray[np.bool_]

    def rows(self, part: slice) -> "EvalBatch":
        """Return the rows of `part` as a batch."""
        return EvalBatch(self.starts[part], self.length, self.counted[part])

    def chunks(self, most: int) -> Iterator["EvalBatch"]:
        """Yield the batch in order, at most `most` characters of each row at a time, between which states carry."""
        for begin in range(0, self.length, most):
            counted = self.counted[:, begin : begin + most]
            yield EvalBatch(self.starts + begin, counted.shape[1], counted)


def stream_batch(num_chars: int, rows: int, warmup: int) -> EvalBatch:
    """Return the batch of the `stream` protocol: each character but the first predicted once, with the state carried.

    The split is read as several rows in parallel. Every row but the first starts `warmup` characters early, uncounted,
    to build up its state.

    Args:
        num_chars: N.
        rows: R; fewer where a row would have less than 4 * warmup characters.
        warmup: Characters.
    """
    predictions = num_chars - 1
    rows = max(1, min(rows, predictions // (4 * max(1, warmup))))
    length = -(-(predictions + (rows - 1) * warmup) // rows)
    starts = np.arange(rows, dtype=np.int64) * (length - warmup)  # (R,)
    columns = np.arange(length)
    counted = (columns >= np.where(starts == 0, 0, warmup)[:, None]) & (starts[:, None] + columns < predictions)
    return EvalBatch(starts, length, counted)  # counted: (R, length)


def sampled_stream_batch(num_chars: int, sample: int, rows: int, warmup: int) -> EvalBatch:
    """Return an estimate of the `stream` protocol: `rows` segments at equal distances, each after a warm-up.

    Args:
        num_chars: N.
        sample: Characters counted; all of the split when it is not longer.
        rows: R.
        warmup: Uncounted characters before each segment.
    """
    predictions = num_chars - 1
    length = -(-sample // rows)
    if sample >= predictions or length * rows >= predictions:
        return stream_batch(num_chars, rows, warmup)
    first = np.linspace(0, predictions - length, rows).astype(np.int64)  # (R,) first counted character
    starts = np.maximum(first - warmup, 0)
    columns = np.arange(warmup + length)
    counted = (columns >= (first - starts)[:, None]) & (columns < (first - starts)[:, None] + length)
    return EvalBatch(starts, warmup + length, counted)  # counted: (R, warmup + length)


def window_batches(num_chars: int, window: int, batch_rows: int) -> Iterator[EvalBatch]:
    """Yield the batches of the `windows` protocol: non-overlapping windows of `window` characters, zero state.

    The last window may be shorter; every character but the first is predicted once.
    """
    predictions = num_chars - 1
    complete = predictions // window
    for first in range(0, complete, batch_rows):
        starts = np.arange(first, min(first + batch_rows, complete), dtype=np.int64) * window  # (R,)
        yield EvalBatch(starts, window, np.ones((len(starts), window), bool))
    tail = predictions - complete * window
    if tail:
        yield EvalBatch(np.array([complete * window], np.int64), tail, np.ones((1, tail), bool))


def sampled_window_batches(num_chars: int, sample: int, window: int, batch_rows: int) -> Iterator[EvalBatch]:
    """Yield an estimate of the `windows` protocol: windows at equal distances, `sample` characters in all, rounded up.

    All of the split when `sample` is not less than it.
    """
    complete = (num_chars - 1) // window
    count = -(-sample // window)
    if count >= complete:
        yield from window_batches(num_chars, window, batch_rows)
        return
    chosen = np.linspace(0, complete - 1, count).astype(np.int64) * window  # (count,)
    for first in range(0, count, batch_rows):
        starts = chosen[first : first + batch_rows]  # (R,)
        yield EvalBatch(starts, window, np.ones((len(starts), window), bool))
