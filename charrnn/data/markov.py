"""Text from a random source whose entropy rate is known exactly: the test that a loss is computed honestly.

A Markov source of order K over A symbols draws each character from a distribution that depends on the K before it. Its
entropy rate is the sum, over contexts, of the context's stationary probability times the entropy of its distribution
(Shannon, "A Mathematical Theory of Communication", 1948, section 7): no model can predict its text better.

    data.source = markov:ORDER:SEED[:CHARS]
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import CorpusError
from charrnn.io import byte_bar, locked, temporary, writing

PREFIX = "markov:"
ALPHABET = "\nabcdefg"
HIGHEST_ORDER = 5
DEFAULT_CHARS = 1_000_000
MOST_CHARS = 10_000_000_000
_A = len(ALPHABET)
# Probabilities are whole multiples of 1 / _UNIT, none below _LEAST of them: the text is the same on every machine, and
# every context can follow every other one, so that the stationary distribution is the only one.
_UNIT = 1 << 16
_LEAST = 64
_BURN_IN = 4096  # characters drawn and thrown away, after which the chain has forgotten where it began
_CHUNK = 1 << 18
_MOST_DIGITS = 18
_CODES = bytes(ord(c) for c in ALPHABET).ljust(256)


@dataclass(frozen=True)
class MarkovSource:
    """A random source of text. order: characters that the next one depends on. seed: of its rows and of its text."""

    order: int
    seed: int
    num_chars: int = DEFAULT_CHARS

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


def named_source(name: str) -> MarkovSource | None:
    """The source that data.source names; None when it names another kind of corpus.

    Raises: CorpusError when it is malformed.
    """
    if not name.startswith(PREFIX):
        return None
    fields = name.removeprefix(PREFIX).split(":")
    form = f"write {PREFIX}ORDER:SEED or {PREFIX}ORDER:SEED:CHARS, for example {PREFIX}2:1"
    if len(fields) not in (2, 3) or not all(field.isascii() and field.isdigit() for field in fields):
        raise CorpusError(f"{name!r} names no random source; {form}")
    if any(len(field) > _MOST_DIGITS for field in fields):
        raise CorpusError(f"{name[:40]!r}... has a number of more than {_MOST_DIGITS} digits; {form}")
    order, seed, chars = (*map(int, fields), DEFAULT_CHARS)[:3]
    if order > HIGHEST_ORDER:
        raise CorpusError(f"{name!r} has order {order}, and {HIGHEST_ORDER} is the highest; {form}")
    if not 1 <= chars <= MOST_CHARS:
        raise CorpusError(f"{name!r} asks for {chars} characters; 1 to {MOST_CHARS} can be had")
    return MarkovSource(order, seed, chars)


def fetch(source: MarkovSource, cache_dir: Path, progress: bool = False) -> Path:
    """The source's text as a file below `cache_dir`, made when it is not there or was changed.

    Its name holds its checksum. Raises: CorpusError when it can't be written.
    """
    stem = f"markov-{source.order}-{source.seed}-{source.num_chars}"
    with writing(cache_dir):
        if found := _whole(cache_dir, stem):
            return found
        with locked(cache_dir / stem):
            return _whole(cache_dir, stem) or _make(source, cache_dir, stem, progress)


def _whole(cache_dir: Path, stem: str) -> Path | None:
    for path in cache_dir.glob(f"{stem}-*.txt"):
        with path.open("rb") as file:
            if path.stem == f"{stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}":
                return path
    return None


def _make(source: MarkovSource, cache_dir: Path, stem: str, progress: bool) -> Path:
    digest = hashlib.sha256()
    with temporary(cache_dir / stem) as hidden:
        with hidden.open("wb") as file, byte_bar(f"writing {stem}", source.num_chars, progress) as advance:
            for chunk in source.chunks():
                digest.update(chunk)
                file.write(chunk)
                advance(len(chunk))
        return hidden.replace(cache_dir / f"{stem}-{digest.hexdigest()[:16]}.txt")
