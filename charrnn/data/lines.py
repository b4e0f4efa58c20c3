"""The lines of a text, counted on its ids in bounded memory: how many, how long, how many of them repeat."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from charrnn.vocab import Ids

_CHUNK = 1 << 21
MOST_LINES = 1 << 24  # different lines remembered: 128 MiB
_EDGES = 2 ** np.arange(0, 41)  # lengths 0, 1, 2-3, 4-7, ...
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Lines:
    """longest, longest_at: characters, and the line's number from 1. histogram: of lengths 0, 1, 2-3, 4-7, 8-15 ...

    not_empty: lines that are not empty. repeated: those of them that occurred before; repeated_chars: their characters.
    compared: how many lines the search for repeated ones saw.
    """

    count: int = 0
    longest: int = 0
    longest_at: int = 0
    not_empty: int = 0
    repeated: int = 0
    repeated_chars: int = 0
    compared: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_EDGES), np.int64))


def count_lines(ids: Ids, newline: int | None) -> Lines:
    """The lines of `ids` (N,). newline: the id that ends one; None when the text has none."""
    found = Lines()
    seen = np.empty(0, np.uint64)
    for lengths, hashes in _blocks(ids, newline):
        longest = int(lengths.argmax())
        if lengths[longest] > found.longest:
            found.longest, found.longest_at = int(lengths[longest]), found.count + longest + 1
        found.count += len(lengths)
        found.histogram += np.bincount(np.searchsorted(_EDGES, lengths, "right"), minlength=len(_EDGES))
        found.not_empty += int((lengths > 0).sum())
        if len(seen) <= MOST_LINES:
            seen = _compare(found, seen, lengths, hashes)
    return found


def _compare(
    found: Lines, seen: NDArray[np.uint64], lengths: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Counts the lines that were seen before, in this block or an earlier one. Returns: the hashes seen, sorted."""
    found.compared += len(lengths)
    some = lengths > 0
    lengths, hashes = lengths[some], hashes[some]
    distinct, first = np.unique(hashes, return_index=True)
    is_new = np.zeros(len(hashes), bool)
    place = np.searchsorted(seen, distinct)
    known = np.zeros(len(distinct), bool)
    if len(seen):
        known = seen.take(place, mode="clip") == distinct
    is_new[first[~known]] = True
    found.repeated += int((~is_new).sum())
    found.repeated_chars += int(lengths[~is_new].sum())
    return np.insert(seen, place[~known], distinct[~known])


def _blocks(ids: Ids, newline: int | None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """(lines,) lengths and hashes of some whole lines at a time."""
    begun, power = 0, _powers(_CHUNK)
    while begun < len(ids):
        block = np.asarray(ids[begun : begun + _CHUNK])
        ends = np.flatnonzero(block == newline) if newline is not None else np.empty(0, np.int64)
        if not len(ends):  # the last line, or one that is longer than a block
            end = _next(ids, newline, begun + len(block))
            digest = _hashes(block, np.array([0]), np.array([len(block)]), power) + np.uint64(end - begun - len(block))
            yield np.array([end - begun]), digest
            begun = end + 1
            continue
        starts = np.concatenate([[0], ends[:-1] + 1])
        yield ends - starts, _hashes(block[: ends[-1] + 1], starts, ends - starts, power)
        begun += int(ends[-1]) + 1


def _next(ids: Ids, newline: int | None, place: int) -> int:
    """Where the next newline is from `place` on, or where the text ends."""
    while newline is not None and place < len(ids):
        ends = np.flatnonzero(ids[place : place + _CHUNK] == newline)
        if len(ends):
            return place + int(ends[0])
        place += _CHUNK
    return len(ids)


def _powers(count: int) -> NDArray[np.uint64]:
    """(count,) 64-bit numbers that look random, an odd one for each place in a line."""
    z = np.arange(1, count + 1, dtype=np.uint64) * _MIX
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return (z ^ (z >> np.uint64(27))) | np.uint64(1)


def _hashes(
    block: Ids, starts: NDArray[np.int64], lengths: NDArray[np.int64], power: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """(lines,) sums over each line of its ids, mixed, times a number of their place (multilinear hashing)."""
    mixed = (block.astype(np.uint64) + np.uint64(1)) * _MIX
    mixed ^= mixed >> np.uint64(29)
    places = np.arange(len(block)) - np.repeat(starts, np.diff(starts, append=len(block)))
    sums = np.zeros(len(block) + 1, np.uint64)
    np.cumsum(mixed * power[places], out=sums[1:])
    return sums[starts + lengths] - sums[starts]
