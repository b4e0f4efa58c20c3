"""Both passes over a corpus: scan takes its checksum and counts its symbols, encode writes its ids.

One thread reads and decodes; others count, or look up ids, which numpy does without the interpreter's lock.

Letters: V vocabulary size, S different symbols of the corpus, n symbols of a piece.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from charrnn.cores import cores
from charrnn.data.decode import Piece
from charrnn.vocab import Vocab

# Symbols of a piece: enough for a call of numpy, and few enough for a core's cache.
_LEAST_SYMBOLS, _MOST_SYMBOLS = 1 << 19, 1 << 20
_MAX_THREADS = 4  # more than one thread can decode for

Item = TypeVar("Item")
Result = TypeVar("Result")
Counts = NDArray[np.int64]


def scan(pieces: Iterable[Piece], advance: Callable[[int], object]) -> "Scan":
    """Run pass one.

    Args:
        pieces: The corpus, as `read_texts` yields it.
        advance: Called with the bytes of UTF-8 that were counted.
    """
    digest, counts = hashlib.sha256(), np.zeros(256, np.int64)
    for raw, found in _map_ordered(_count, _regrouped(pieces)):
        digest.update(raw)
        if len(found) > len(counts):
            counts = np.concatenate([counts, np.zeros(len(found) - len(counts), np.int64)])
        counts[: len(found)] += found
        advance(len(raw))
    symbols = np.flatnonzero(counts)
    return Scan(digest.hexdigest(), symbols, counts[symbols])


@dataclass(frozen=True)
class Scan:
    """What pass one found.

    Attributes:
        sha256: Of the normalized text's UTF-8 (of a binary corpus's bytes).
        symbols: (S,) code points or bytes, sorted.
        counts: (S,) occurrences of each.
    """

    sha256: str
    symbols: NDArray[np.int64]
    counts: Counts

    @property
    def num_chars(self) -> int:
        """N, the number of symbols in the corpus."""
        return int(self.counts.sum())


def encode(pieces: Iterable[Piece], table: "IdTable", path: Path, advance: Callable[[int], object]) -> int:
    """Run pass two: write the ids of a corpus to the new file `path`. Returns their number. Raises: OSError.

    Args:
        pieces: The corpus, as `read_texts` yields it.
        table: The ids.
        path: File.
        advance: Called with the number of ids that were written.
    """
    total = 0
    with path.open("wb") as file:
        for ids in _map_ordered(table.encode, _regrouped(pieces)):
            file.write(ids.data)
            total += len(ids)
            advance(len(ids))
    return total


@dataclass(frozen=True)
class IdTable:
    """The map from symbols to stored ids.

    Attributes:
        ids: (highest symbol + 2,) by symbol, little-endian; the last one is for all higher symbols. Symbols that the
            vocabulary lacks have its replacement's.
        known: The same shape: which symbols have an id of their own; None when none are skipped.
    """

    ids: NDArray[np.unsignedinteger]
    known: NDArray[np.bool_] | None

    @classmethod
    def of(cls, vocab: Vocab, *, skip: bool) -> "IdTable":
        """Build the table of a vocabulary. skip: drop symbols that it lacks."""
        symbols = code_points(vocab)  # (V,)
        other = vocab.symbols.index(vocab.replacement) if vocab.replacement is not None else 0
        ids = np.full(int(symbols.max()) + 2, other, vocab.dtype.newbyteorder("<"))
        ids[symbols] = np.arange(len(symbols))
        known = np.zeros(len(ids), bool)
        known[symbols] = True
        return cls(ids, known if skip else None)

    def of_symbols(self, symbols: NDArray[Any]) -> NDArray[np.unsignedinteger]:
        """Return the (n,) ids of symbols (n,); skipped symbols have none."""
        if self.known is not None:
            symbols = symbols[self.known.take(symbols, mode="clip")]
        return self.ids.take(symbols, mode="clip")

    def encode(self, piece: Piece) -> NDArray[np.unsignedinteger]:
        """Return the (n,) ids of a piece; skipped symbols have none."""
        if not _has_bytes(piece):
            return self.of_symbols(_code_points(piece))
        if self.known is None and self.ids.itemsize == 1:
            return np.frombuffer(_utf8(piece).translate(self._of_bytes), np.uint8)
        return self.of_symbols(np.frombuffer(_utf8(piece), np.uint8))

    @cached_property
    def _of_bytes(self) -> bytes:
        return self.of_symbols(np.arange(256)).tobytes()


def code_points(vocab: Vocab) -> NDArray[np.int64]:
    """Return the (V,) bytes or code points of the vocabulary's symbols."""
    return np.arange(256) if vocab.kind == "bytes" else np.array([ord(symbol) for symbol in vocab.symbols], np.int64)


def _regrouped(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join short pieces and cut long ones."""
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece.text)
        if size >= _LEAST_SYMBOLS:
            yield from _cut(_joined(held))
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(pieces: list[Piece]) -> Piece:
    texts: Any = [piece.text for piece in pieces]
    utf8 = [piece.utf8 for piece in pieces if piece.utf8 is not None]
    return Piece(texts[0][:0].join(texts), b"".join(utf8) if len(utf8) == len(pieces) else None)


def _cut(piece: Piece) -> Iterator[Piece]:
    if len(piece.text) <= _MOST_SYMBOLS:
        yield piece
    else:
        starts = range(0, len(piece.text), _MOST_SYMBOLS)
        yield from (Piece(piece.text[start : start + _MOST_SYMBOLS]) for start in starts)


def _map_ordered(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply `function` to the items in threads, a few of them at a time; yield the results in order."""
    threads = min(cores(), _MAX_THREADS)
    _keep_freed_memory(16 * _LEAST_SYMBOLS)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def _keep_freed_memory(largest: int) -> None:
    """Make glibc reuse freed blocks of up to `largest` bytes instead of returning them to the system.

    It returns those that are larger than each block that it has mapped and freed before: M_MMAP_THRESHOLD in
    mallopt(3). The system clears the pages of a new one, which for a piece's arrays takes as long as to fill them.
    """
    bytes(largest)  # mapped and freed


def _count(piece: Piece) -> tuple[bytes, Counts]:
    """Return the piece's UTF-8, and the occurrences of each symbol up to the highest."""
    utf8 = _utf8(piece)
    if not _has_bytes(piece):
        return utf8, np.bincount(_code_points(piece))
    # Two bytes at a time, since numpy takes as long for an element of any width.
    even = len(utf8) // 2 * 2
    pairs = np.bincount(np.frombuffer(utf8[:even], np.uint16), minlength=1 << 16).reshape(256, 256)
    last = np.bincount(np.frombuffer(utf8[even:], np.uint8), minlength=256)
    return utf8, pairs.sum(0) + pairs.sum(1) + last


def _has_bytes(piece: Piece) -> bool:
    """Return whether each symbol is one byte."""
    return isinstance(piece.text, bytes) or piece.text.isascii()


def _utf8(piece: Piece) -> bytes:
    if piece.utf8 is not None:
        return piece.utf8
    return piece.text if isinstance(piece.text, bytes) else piece.text.encode()


def _code_points(piece: Piece) -> NDArray[np.uint32]:
    return np.array(str(piece.text)).reshape(1).view(np.uint32)  # faster than the codec utf-32
