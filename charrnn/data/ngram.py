"""The loss of an interpolated Kneser-Ney n-gram model: the baseline that a trained network must beat.

P_k(x | c) = (max(n(c, x) - D, 0) + D d(c) P_{k-1}(x | c')) / n(c), where n counts occurrences (below the highest order:
the distinct characters that precede c x), d(c) is the number of distinct characters seen after the context c, and c' is
c without its first character. Source: Kneser and Ney, "Improved Backing-off for M-gram Language Modeling", ICASSP 1995;
Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", arXiv cmp-lg/9606011.
"""

import numpy as np
from numpy.typing import NDArray

from charrnn.data.stats import packed
from charrnn.vocab import Ids

ORDER = 6
_DISCOUNT = 0.85  # the best of 0.5, 0.75 and 0.85 on 20 KB to 1.1 MB of two texts
_MOST_TRAINED = 1 << 20  # characters; a second of counting
_MOST_EVALUATED = 1 << 17


def ngram_loss(train: Ids, val: Ids, symbols: int, order: int = ORDER) -> float:
    """The loss on `val`, nats/char, of the model counted on `train`.

    At most the last 1,048,576 characters of `train` are counted, and the first 131,072 of `val` predicted.

    Args:
        train: (N,) ids, N at least 1.
        val: (M,) ids, M at least 1.
        symbols: V, above every id.
        order: Characters of the longest n-gram; fewer where that many do not fit a 64-bit key.
    """
    train, val = train[-_MOST_TRAINED:], val[:_MOST_EVALUATED]
    bits = max(1, (symbols - 1).bit_length())
    order = min(order, 64 // bits, len(train))
    joined = np.concatenate([train[len(train) - order + 1 :], val])  # the first of val have a context too
    probability = np.full(len(val), 1.0 / symbols)  # (M,)
    for k in range(1, order + 1):
        grams = packed(train, k, bits)
        if k < order:
            grams = np.unique(packed(train, k + 1, bits)) & np.uint64((1 << (bits * k)) - 1)
        grams, counts = np.unique(grams, return_counts=True)  # (G,)
        contexts, first = np.unique(grams >> np.uint64(bits), return_index=True)  # (C,)
        wanted = packed(joined, k, bits)[-len(val) :]  # (M,) each character of val after its context
        context = wanted >> np.uint64(bits)
        n = _looked_up(contexts, np.add.reduceat(counts, first), context)  # (M,)
        d = _looked_up(contexts, np.diff(first, append=len(grams)), context)  # (M,)
        discounted = np.maximum(_looked_up(grams, counts, wanted) - _DISCOUNT, 0.0)
        probability = np.where(n, (discounted + _DISCOUNT * d * probability) / np.maximum(n, 1), probability)
    return float(-np.log(probability).mean())


def _looked_up(
    keys: NDArray[np.uint64], values: NDArray[np.integer], wanted: NDArray[np.uint64]
) -> NDArray[np.integer]:
    """(M,) the value of each wanted key, 0 where it is absent. keys: sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
