"""Statistics of a text: the entropy of a character in context, the loss of an n-gram model, its lines.

Letters: N characters, V vocabulary size.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn.vocab import Ids

HIGHEST_ORDER = 3
NGRAM_ORDER = 6
SAMPLE_CHARS = 1 << 21  # 0.3 s of counting
_SAMPLES = 8
_CHUNK = 1 << 22
_DISCOUNT = 0.85  # the best of 0.5, 0.75 and 0.85 on 20 KB to 1.1 MB of two texts
_MAX_TRAINED = 1 << 20  # characters; a second of counting
_MAX_EVALUATED = 1 << 17
MAX_LINES = 1 << 22  # lines compared: 400 MiB when all differ
_MAX_COMPARED = 1 << 20  # characters of a line


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


def entropies(ids: Ids, symbols: int) -> Entropies:
    """Return the entropies of a text, of at most SAMPLE_CHARS of it in samples spread evenly over it.

    Args:
        ids: (N,) ids, N at least 1.
        symbols: V, above every id.
    """
    samples = [ids]
    if len(ids) > SAMPLE_CHARS:
        length = SAMPLE_CHARS // _SAMPLES
        starts = np.linspace(0, len(ids) - length, _SAMPLES).astype(np.int64)
        samples = [ids[start : start + length] for start in starts]
    bits = _bits(symbols)
    longest = min(HIGHEST_ORDER + 1, len(ids), 64 // bits)
    grams = np.concatenate([_pack(sample, longest, bits) for sample in samples])
    counted = sum(map(len, samples))
    return Entropies(_conditional(*np.unique(grams, return_counts=True), longest, bits), counted, len(ids))


def _bits(symbols: int) -> int:
    """Return the bits that hold an id."""
    return max(1, (symbols - 1).bit_length())


def _pack(ids: Ids, length: int, bits: int) -> NDArray[np.uint64]:
    """Return (N - length + 1,) each run of `length` ids as one number, the first one in the highest bits."""
    count = max(0, len(ids) - length + 1)
    packed = np.zeros(count, np.uint64)
    for k in range(length):
        packed = packed << np.uint64(bits) | ids[k : k + count]
    return packed


def _conditional(keys: NDArray[np.uint64], counts: NDArray[np.int64], longest: int, bits: int) -> tuple[float, ...]:
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


def count_lines(ids: Ids, newline: int | None) -> dict[str, Any]:
    """Return statistics of the lines of a text; the search for repeated ones stops after MAX_LINES.

    Args:
        ids: (N,) ids, N at least 1.
        newline: The id that ends a line; None when the text has none.

    Returns:
        `count`; `longest` in characters and `longest_at`, its number from 1; `not_empty`; `repeated`, the lines that
        are not empty and occurred before, and `repeated_chars`, the characters in them, among the first `compared`;
        `lengths`, the number of lines of 0, 1, 2-3, 4-7, 8-15 ... characters.
    """
    starts = range(0, len(ids), _CHUNK)
    found = [start + np.flatnonzero(ids[start : start + _CHUNK] == newline) for start in starts]
    ends = np.concatenate([*found, [len(ids)] if ids[-1] != newline else []]).astype(np.int64)  # (L,)
    lengths = np.diff(ends, prepend=-1) - 1  # (L,)
    seen: set[tuple[int, int]] = set()
    repeated = repeated_chars = 0
    for end, length in zip(ends[:MAX_LINES].tolist(), lengths[:MAX_LINES].tolist(), strict=True):
        line = ids[end - length : end - length + min(length, _MAX_COMPARED)]
        key = (length, hash(line.tobytes()))
        if length and key in seen:
            repeated += 1
            repeated_chars += length
        seen.add(key)
    histogram = np.bincount(np.frexp(lengths)[1]).tolist()  # by the bits of the length
    ranges = ["0", "1", *(f"{1 << bits}-{(2 << bits) - 1}" for bits in range(1, len(histogram) - 1))]
    return {
        "count": len(lengths),
        "longest": int(lengths.max()),
        "longest_at": int(lengths.argmax()) + 1,
        "not_empty": int(np.count_nonzero(lengths)),
        "repeated": repeated,
        "repeated_chars": repeated_chars,
        "compared": min(len(lengths), MAX_LINES),
        "lengths": {name: count for name, count in zip(ranges, histogram, strict=False) if count},
    }
