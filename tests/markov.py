"""Text from a Markov source whose entropy rate is known exactly: the reference for an honestly computed loss.

A source of order K over A symbols draws each character from a distribution that depends on the K before it. Its entropy
rate is the sum, over contexts, of the context's stationary probability times the entropy of its distribution (Shannon,
"A Mathematical Theory of Communication", 1948, section 7): no model can predict its text better.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ALPHABET = "\nabcdefg"
_A = len(ALPHABET)
# Probabilities are whole multiples of 1 / _UNIT, none below _LEAST of them: the text is the same on every machine, and
# every context can follow every other one, so that the stationary distribution is the only one.
_UNIT = 1 << 16
_LEAST = 64
_BURN_IN = 4096  # characters drawn and thrown away, after which the chain has forgotten where it began
_CHUNK = 1 << 18
_CODES = bytes(ord(c) for c in ALPHABET).ljust(256)


@dataclass(frozen=True)
class MarkovSource:
    """A random source of text. order: characters that the next one depends on. seed: of its rows and of its text."""

    order: int
    seed: int
    num_chars: int = 1_000_000

    @property
    def contexts(self) -> int:
        """C, the number of different contexts."""
        return int(_A**self.order)

    @cached_property
    def weights(self) -> NDArray[np.int64]:
        """(C, A) each context's distribution in units of 2^-16: Dirichlet(1/2) rows, rounded, none 0."""
        uniform = (self._bits(0).random_raw(2 * self.contexts * _A) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        u, v = (uniform + 2.0**-54).reshape(2, self.contexts, _A)
        gamma = -np.log(u) * np.cos(2 * np.pi * v) ** 2  # Gamma(1/2): half the square of a Box-Muller normal
        shares = gamma / gamma.sum(1, keepdims=True)
        weights = _LEAST + np.floor(shares * (_UNIT - _LEAST * _A)).astype(np.int64)
        weights[np.arange(self.contexts), weights.argmax(1)] += _UNIT - weights.sum(1)
        return weights

    @cached_property
    def stationary(self) -> NDArray[np.float64]:
        """(C,) how often each context occurs in the long run: the fixed point of the transition, iterated to it."""
        p = np.full(self.contexts, 1 / self.contexts)
        for _ in range(10_000):
            joint = p[:, None] * (self.weights / _UNIT)  # (C, A) probability of a context and what follows
            after = joint.reshape(_A, -1).sum(0) if self.order else p  # the oldest character is forgotten
            if np.abs(after - p).sum() < 1e-15:
                break
            p = after / after.sum()
        return p

    @property
    def entropy_rate(self) -> float:
        """Bits a character that no model can undercut in the long run."""
        q = self.weights / _UNIT  # (C, A)
        return float(self.stationary @ -(q * np.log2(q)).sum(1))

    def surprises(self, text: str) -> NDArray[np.float64]:
        """(len(text) - order,) bits: -log2 of the true probability of each character but the first `order`."""
        symbols = np.array([ALPHABET.index(c) for c in text], np.int64)
        count = len(symbols) - self.order
        context = np.zeros(count, np.int64)
        for k in range(self.order):
            context = context * _A + symbols[k : k + count]
        return np.asarray(-np.log2(self.weights[context, symbols[self.order :]] / _UNIT))

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces; the same on every machine and for every version of numpy."""
        bits = self._bits(1)
        following = np.cumsum(self.weights, 1)[:, :-1].tolist()
        context = 0
        _, context = _walk(following, context, bits.random_raw(_BURN_IN))
        for begun in range(0, self.num_chars, _CHUNK):
            text, context = _walk(following, context, bits.random_raw(min(_CHUNK, self.num_chars - begun)))
            yield text

    def _bits(self, purpose: int) -> np.random.PCG64:
        """A stream of its own of random bits, whose raw numbers numpy keeps the same (NEP 19)."""
        return np.random.PCG64(np.random.SeedSequence([self.seed, self.order, purpose]))


def _walk(following: list[list[int]], context: int, raw: NDArray[np.uint64]) -> tuple[bytes, int]:
    """As many characters as there are numbers, and the context after them. following: (C, A - 1) cumulated weights."""
    symbols = bytearray()
    contexts = len(following)
    for draw in (raw >> np.uint64(48)).tolist():
        symbol = bisect_right(following[context], draw)
        symbols.append(symbol)
        context = (context * _A + symbol) % contexts
    return bytes(symbols.translate(_CODES)), context
