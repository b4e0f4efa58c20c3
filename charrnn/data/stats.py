"""How hard a text is to predict: the entropy of a character given the 0 to 3 before it, counted on the text itself.

The plug-in estimate: the frequencies in the text stand for probabilities (Shannon, "Prediction and Entropy of Printed
English", 1951). It is what the best table of such contexts would score on the very text it was made from: for a small
text, or many symbols, too low, since contexts that occur once look certain.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from charrnn.vocab import Ids

HIGHEST_ORDER = 3
# What the trainer counts at its start, in pieces spread over the split: 0.3 s.
GLANCE_CHARS = 1 << 21
_PIECES = 8
_CHUNK = 1 << 22
MOST_GRAMS = 1 << 24  # different 4-grams kept: 256 MiB

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Entropies:
    """bits: of a character given the 0, 1, 2 and 3 before it, in bits/char, as many as can be had.

    counted: characters they are of; of: characters there are.
    """

    bits: tuple[float, ...]
    counted: int
    of: int

    def line(self) -> str:
        """The figures on one line."""
        figures = ", ".join(f"{bits:.3f} ({order})" for order, bits in enumerate(self.bits))
        share = "" if self.counted == self.of else f"; counted on {self.counted:,} of {self.of:,}"
        return f"{figures} bits/char by the frequencies of characters after 0 to {len(self.bits) - 1} others{share}"


def glance(ids: Ids, symbols: int) -> Entropies:
    """The entropies of at most GLANCE_CHARS of `ids` (N,), in pieces spread evenly over them."""
    if len(ids) <= GLANCE_CHARS:
        return _entropies([ids], symbols, len(ids))
    length = GLANCE_CHARS // _PIECES
    starts = np.linspace(0, len(ids) - length, _PIECES).astype(np.int64)
    return _entropies([ids[start : start + length] for start in starts], symbols, len(ids))


def entropies(ids: Ids, symbols: int) -> Entropies:
    """The entropies of `ids` (N,), in bounded memory: counting ends where MOST_GRAMS different 4-grams were seen.

    symbols: V, above every id.
    """
    overlap = HIGHEST_ORDER  # so that a chunk's 4-grams go on where the one before ended
    pieces = (ids[start : start + _CHUNK + overlap] for start in range(0, max(1, len(ids) - overlap), _CHUNK))
    return _entropies(pieces, symbols, len(ids), overlap)


def _entropies(pieces: Iterator[Ids] | list[Ids], symbols: int, total: int, overlap: int = 0) -> Entropies:
    """overlap: characters at the start of each piece but the first that the one before ended with."""
    bits = max(1, (symbols - 1).bit_length())
    longest = max(1, min(HIGHEST_ORDER + 1, total, 64 // bits))
    keys, counts, read = np.empty(0, np.uint64), np.empty(0, np.int64), 0
    for piece in pieces:
        keys, counts = _merged(keys, counts, *np.unique(packed(piece, longest, bits), return_counts=True))
        read += len(piece) - (overlap if read else 0)
        if len(keys) > MOST_GRAMS:
            break
    return Entropies(_conditional(keys, counts, longest, bits), read, total)


def packed(ids: Ids, length: int, bits: int) -> Keys:
    """(N - length + 1,) each run of `length` ids as one number, the first one in the highest bits."""
    count = max(0, len(ids) - length + 1)
    packed = np.zeros(count, np.uint64)
    for k in range(length):
        packed = packed << np.uint64(bits) | ids[k : k + count]
    return packed


def _merged(keys: Keys, counts: Counts, more_keys: Keys, more_counts: Counts) -> tuple[Keys, Counts]:
    """The sum of two tables, each with its keys in order."""
    if not len(keys):
        return more_keys, more_counts
    joined = np.concatenate([keys, more_keys])
    order = np.argsort(joined, kind="stable")
    joined, both = joined[order], np.concatenate([counts, more_counts])[order]
    starts = np.flatnonzero(np.diff(joined, prepend=joined[0] ^ np.uint64(1)))
    return joined[starts], np.add.reduceat(both, starts)


def _conditional(keys: Keys, counts: Counts, longest: int, bits: int) -> tuple[float, ...]:
    """Entropy of (k + 1)-grams less that of k-grams, for each k: both are prefixes of the sorted `longest`-grams."""
    joint = [0.0]
    for length in range(1, longest + 1):
        prefixes = keys >> np.uint64(bits * (longest - length))
        starts = np.flatnonzero(np.diff(prefixes, prepend=prefixes[0] ^ np.uint64(1)))
        share = np.add.reduceat(counts, starts) / counts.sum()
        joint.append(float(-(share * np.log2(share)).sum()))
    return tuple(max(0.0, b - a) for a, b in pairwise(joint))
