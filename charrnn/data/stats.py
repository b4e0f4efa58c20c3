"""Statistics of a text: the entropy of a character in context, the loss of an n-gram model, its lines.

Letters: N characters, V vocabulary size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from charrnn.vocab import Ids

HIGHEST_ORDER = 3
NGRAM_ORDER = 6
SAMPLE_CHARS = 1 << 21  # 0.3 s of counting
_SAMPLES = 8
_CHUNK = 1 << 22
MAX_GRAMS = 1 << 24  # different 4-grams counted: 256 MiB
_DISCOUNT = 0.85  # the best of 0.5, 0.75 and 0.85 on 20 KB to 1.1 MB of two texts
_MAX_TRAINED = 1 << 20  # characters; a second of counting
_MAX_EVALUATED = 1 << 17
MAX_LINES = 1 << 22  # different lines remembered: 400 MiB
_MAX_COMPARED = 1 << 20  # characters of a line

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]


# ---- entropy


@dataclass(frozen=True)
class Entropies:
    """Plug-in estimates of conditional entropies: frequencies in the text stand for probabilities.

    It is what the best table of such contexts would score on the very text it was counted on; for a small text, or many
    symbols, it is too low, since contexts that occur once look certain. Source: Shannon, "Prediction and Entropy of
    Printed English", 1951.

    Attributes:
        bits: Bits/char given the 0, 1, 2 and 3 characters before, as many as could be counted.
        counted: Number of characters counted.
        total: Number of characters in the text.
    """

    bits: tuple[float, ...]
    counted: int
    total: int

    def line(self) -> str:
        """Format as one line."""
        values = ", ".join(f"{bits:.3f} ({order})" for order, bits in enumerate(self.bits))
        share = "" if self.counted == self.total else f"; counted on {self.counted:,} of {self.total:,}"
        return f"{values} bits/char by the frequencies of characters after 0 to {len(self.bits) - 1} others{share}"


def sampled_entropies(ids: Ids, symbols: int) -> Entropies:
    """Return the entropies of at most SAMPLE_CHARS of `ids` (N,), in samples spread evenly over them."""
    if len(ids) <= SAMPLE_CHARS:
        return _entropies([ids], symbols, len(ids))
    length = SAMPLE_CHARS // _SAMPLES
    starts = np.linspace(0, len(ids) - length, _SAMPLES).astype(np.int64)
    return _entropies((ids[start : start + length] for start in starts), symbols, len(ids))


def entropies(ids: Ids, symbols: int) -> Entropies:
    """Return the entropies of `ids` (N,); counting stops at MAX_GRAMS different 4-grams.

    Args:
        ids: (N,) ids.
        symbols: V, above every id.
    """
    overlap = HIGHEST_ORDER  # so that a chunk's 4-grams continue those of the one before
    pieces = (ids[start : start + _CHUNK + overlap] for start in range(0, max(1, len(ids) - overlap), _CHUNK))
    return _entropies(pieces, symbols, len(ids), overlap)


def _entropies(pieces: Iterable[Ids], symbols: int, total: int, overlap: int = 0) -> Entropies:
    """overlap: characters at the start of each piece but the first that the one before ended with."""
    bits = _bits(symbols)
    longest = max(1, min(HIGHEST_ORDER + 1, total, 64 // bits))
    keys, counts, read = np.empty(0, np.uint64), np.empty(0, np.int64), 0
    for piece in pieces:
        keys, counts = _merge(keys, counts, *np.unique(_pack(piece, longest, bits), return_counts=True))
        read += len(piece) - (overlap if read else 0)
        if len(keys) > MAX_GRAMS:
            break
    return Entropies(_conditional(keys, counts, longest, bits), read, total)


def _bits(symbols: int) -> int:
    """Return the bits that hold an id."""
    return max(1, (symbols - 1).bit_length())


def _pack(ids: Ids, length: int, bits: int) -> Keys:
    """Return (N - length + 1,) each run of `length` ids as one number, the first one in the highest bits."""
    count = max(0, len(ids) - length + 1)
    packed = np.zeros(count, np.uint64)
    for k in range(length):
        packed = packed << np.uint64(bits) | ids[k : k + count]
    return packed


def _merge(keys: Keys, counts: Counts, more_keys: Keys, more_counts: Counts) -> tuple[Keys, Counts]:
    """Return the sum of two tables with sorted keys."""
    if not len(keys):
        return more_keys, more_counts
    joined = np.concatenate([keys, more_keys])
    order = np.argsort(joined, kind="stable")
    joined, both = joined[order], np.concatenate([counts, more_counts])[order]
    starts = np.flatnonzero(np.diff(joined, prepend=joined[0] ^ np.uint64(1)))
    return joined[starts], np.add.reduceat(both, starts)


def _conditional(keys: Keys, counts: Counts, longest: int, bits: int) -> tuple[float, ...]:
    """Return the entropy of (k + 1)-grams less that of k-grams for each k; both are prefixes of the sorted grams."""
    joint = [0.0]
    for length in range(1, longest + 1):
        prefixes = keys >> np.uint64(bits * (longest - length))
        starts = np.flatnonzero(np.diff(prefixes, prepend=prefixes[0] ^ np.uint64(1)))
        share = np.add.reduceat(counts, starts) / counts.sum()
        joint.append(float(-(share * np.log2(share)).sum()))
    return tuple(max(0.0, b - a) for a, b in pairwise(joint))


# ---- n-gram model


def ngram_loss(train: Ids, val: Ids, symbols: int, order: int = NGRAM_ORDER) -> float:
    """Return the loss on `val`, in nats/char, of an interpolated Kneser-Ney model counted on `train`.

    P_k(x | c) = (max(n(c, x) - D, 0) + D d(c) P_{k-1}(x | c')) / n(c), where n counts occurrences (below the highest
    order: the distinct characters that precede c x), d(c) is the number of distinct characters seen after the context
    c, and c' is c without its first character. Source: Kneser and Ney, "Improved Backing-off for M-gram Language
    Modeling", ICASSP 1995; Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", arXiv
    cmp-lg/9606011.

    At most the last 1,048,576 characters of `train` are counted, and the first 131,072 of `val` predicted.

    Args:
        train: (N,) ids, N at least 1.
        val: (M,) ids, M at least 1.
        symbols: V, above every id.
        order: Characters of the longest n-gram; fewer where that many do not fit a 64-bit key.
    """
    train, val = train[-_MAX_TRAINED:], val[:_MAX_EVALUATED]
    bits = _bits(symbols)
    order = min(order, 64 // bits, len(train))
    joined = np.concatenate([train[len(train) - order + 1 :], val])  # the first of val have a context too
    probability = np.full(len(val), 1.0 / symbols)  # (M,)
    for k in range(1, order + 1):
        grams = _pack(train, k, bits)
        if k < order:
            grams = np.unique(_pack(train, k + 1, bits)) & np.uint64((1 << (bits * k)) - 1)
        grams, counts = np.unique(grams, return_counts=True)  # (G,)
        contexts, first = np.unique(grams >> np.uint64(bits), return_index=True)  # (C,)
        wanted = _pack(joined, k, bits)[-len(val) :]  # (M,) each character of val after its context
        context = wanted >> np.uint64(bits)
        n = _lookup(contexts, np.add.reduceat(counts, first), context)  # (M,)
        d = _lookup(contexts, np.diff(first, append=len(grams)), context)  # (M,)
        discounted = np.maximum(_lookup(grams, counts, wanted) - _DISCOUNT, 0.0)
        probability = np.where(n, (discounted + _DISCOUNT * d * probability) / np.maximum(n, 1), probability)
    return float(-np.log(probability).mean())


def _lookup(keys: NDArray[np.uint64], values: NDArray[np.integer], wanted: NDArray[np.uint64]) -> NDArray[np.integer]:
    """Return (M,) the value of each wanted key, 0 where it is absent. keys: sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


# ---- lines


@dataclass
class Lines:
    """The lines of a text.

    Attributes:
        count: Number of lines.
        longest: Characters of the longest.
        longest_at: Its number, from 1.
        not_empty: Lines that are not empty.
        repeated: Those of them that occurred before.
        repeated_chars: Characters in the repeated ones.
        compared: Lines that the search for repeated ones saw.
        histogram: Number of lines of 0, 1, 2-3, 4-7, 8-15 ... characters.
    """

    count: int = 0
    longest: int = 0
    longest_at: int = 0
    not_empty: int = 0
    repeated: int = 0
    repeated_chars: int = 0
    compared: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * 64)


def count_lines(ids: Ids, newline: int | None) -> Lines:
    """Count the lines of a text; the search for repeated ones stops at MAX_LINES different ones.

    Args:
        ids: (N,) ids.
        newline: The id that ends a line; None when the text has none.
    """
    found = Lines()
    seen: set[int] = set()
    for length, start in _lines(ids, newline):
        found.count += 1
        found.histogram[length.bit_length()] += 1
        found.not_empty += length > 0
        if length > found.longest:
            found.longest, found.longest_at = length, found.count
        if len(seen) >= MAX_LINES:
            continue
        found.compared += 1
        key = hash((length, start))
        if length and key in seen:
            found.repeated += 1
            found.repeated_chars += length
        elif length:
            seen.add(key)
    return found


def _lines(ids: Ids, newline: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the length of each line, and its first _MAX_COMPARED ids as bytes."""
    length, start = 0, b""
    for begin in range(0, len(ids), _CHUNK):
        block = np.asarray(ids[begin : begin + _CHUNK])
        raw, width = block.tobytes(), block.itemsize
        ends = np.flatnonzero(block == newline).tolist() if newline is not None else []
        first = 0
        for end in ends:
            line = raw[first * width : min(end, first + _MAX_COMPARED) * width]
            yield length + end - first, (start + line)[: _MAX_COMPARED * width]
            length, start, first = 0, b"", end + 1
        length += len(block) - first
        start = (start + raw[first * width : (first + _MAX_COMPARED) * width])[: _MAX_COMPARED * width]
    if length:
        yield length, start
