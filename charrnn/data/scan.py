"""Pass one over a corpus, task by task on all cores: its checksum, and how often each of its S symbols occurs."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from charrnn.data.parts import Source
from charrnn.data.pieces import Piece, Rules, Trace
from charrnn.data.tasks import Task, bytes_on_disk, changed_error, raw_chunks, read_task, split_tasks
from charrnn.data.workers import Workers
from charrnn.io import Advance
from charrnn.vocab import Vocab

NEWLINE = Piece(utf8=b"\n")

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """What pass one found in a task.

    Attributes:
        ids: Number of ids it will have.
        checksum: CRC-32 of its bytes.
        separated: Whether a newline, not among its ids, is put before it.
    """

    ids: int
    checksum: int
    separated: bool


@dataclass(frozen=True)
class Scan:
    """What pass one found.

    Attributes:
        sha256: Of the normalized text's UTF-8 (of a binary corpus's bytes).
        symbols: (S,) code points or bytes, sorted.
        counts: (S,) occurrences of each.
        blocks: One for each task.
        replaced: Number of invalid sequences replaced.
        replaced_at: Place of the first of them.
    """

    sha256: str
    symbols: NDArray[np.int64]
    counts: Counts
    blocks: tuple[Block, ...]
    replaced: int = 0
    replaced_at: str = ""

    @property
    def num_chars(self) -> int:
        """N, the number of symbols in the corpus."""
        return int(self.counts.sum())


class _Histogram:
    """Occurrences of each symbol, up to the highest one seen."""

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(256, np.int64)

    def add(self, symbols: NDArray[np.unsignedinteger]) -> None:
        if symbols.dtype == np.uint8 and len(symbols) > 1 << 18:
            # Two bytes at a time, since numpy takes as long for an element of any width.
            pairs = symbols[: len(symbols) // 2 * 2].view(np.uint16)
            square = np.bincount(pairs, minlength=1 << 16).reshape(256, 256)
            self._add(square.sum(0) + square.sum(1))
            symbols = symbols[len(pairs) * 2 :]
        self._add(np.bincount(symbols))

    def add_counts(self, symbols: NDArray[np.int64], counts: Counts) -> None:
        self._grow(int(symbols.max(initial=0)) + 1)
        self.counts[symbols] += counts

    def _add(self, counts: Counts) -> None:
        self._grow(len(counts))
        self.counts[: len(counts)] += counts

    def _grow(self, size: int) -> None:
        if size > len(self.counts):
            self.counts = np.concatenate([self.counts, np.zeros(size - len(self.counts), np.int64)])


@dataclass
class _TaskCounts:
    """A worker's answer. utf8: the task's normalized text, None when its bytes are just that."""

    symbols: NDArray[np.int64]
    counts: Counts
    utf8: bytes | None
    begins: bool
    ends_line: bool
    trace: Trace


@dataclass(frozen=True)
class _Count:
    """Pass one over a task, in a worker."""

    rules: Rules

    def __call__(self, task: Task) -> _TaskCounts:
        histogram, trace = _Histogram(), Trace()
        collected: list[bytes] = []
        unchanged, starts_document, last = True, False, None
        for begins, piece in read_task(task, self.rules, trace):
            if last is None:
                starts_document = begins
            elif begins and separates_documents(self.rules) and not last.ends_line():
                unchanged = False
                histogram.add(NEWLINE.symbols())
                collected.append(b"\n")
            unchanged = unchanged and piece.utf8 is not None
            histogram.add(piece.symbols())
            collected.append(piece.raw())
            last = piece
        unchanged = unchanged and not trace.transcoded
        unchanged = unchanged and sum(map(len, collected)) == sum(segment.size for segment in task)
        symbols = np.flatnonzero(histogram.counts)
        utf8 = None if unchanged else b"".join(collected)
        ends_line = last is None or last.ends_line()
        return _TaskCounts(symbols, histogram.counts[symbols], utf8, starts_document, ends_line, trace)


def separates_documents(rules: Rules) -> bool:
    """Return whether each document begins on a new line: where no other end is put after it."""
    return not rules.binary and not rules.document_end


def scan(source: Source, rules: Rules, workers: Workers, advance: Advance, known: Vocab | None = None) -> Scan:
    """Run pass one: count the symbols and take the checksum.

    Args:
        source: The corpus.
        rules: How its bytes become symbols.
        workers: They count.
        advance: Called with the bytes on disk that were read.
        known: Vocabulary whose missing symbols get no ids; None = all symbols get one.

    Raises:
        CorpusError: The corpus cannot be read or decoded, or changes meanwhile.
    """
    digest, total, trace = hashlib.sha256(), _Histogram(), Trace()
    blocks: list[Block] = []
    ends_line = True
    for task, found in workers.map(_Count(rules), split_tasks(source.parts, rules, advance, trace)):
        is_empty = not len(found.counts)
        separated = separates_documents(rules) and found.begins and not ends_line and not is_empty
        if separated:
            digest.update(b"\n")
            total.add(NEWLINE.symbols())
        for raw in [found.utf8] if found.utf8 is not None else _reread(task, found, source):
            digest.update(raw)
        total.add_counts(found.symbols, found.counts)
        kept = found.counts if known is None else found.counts[has_id(found.symbols, known)]
        blocks.append(Block(int(kept.sum()), found.trace.checksum, separated))
        trace.replaced_at = trace.replaced_at or found.trace.replaced_at
        trace.replaced += found.trace.replaced
        ends_line = ends_line if is_empty else found.ends_line
        advance(bytes_on_disk(task))
    symbols = np.flatnonzero(total.counts)
    return Scan(digest.hexdigest(), symbols, total.counts[symbols], tuple(blocks), trace.replaced, trace.replaced_at)


def _reread(task: Task, found: _TaskCounts, source: Source) -> Iterator[bytes]:
    """Read the task's bytes again for the digest, which can only be taken in order."""
    trace = Trace()
    for segment in task:
        yield from raw_chunks(segment, trace)
    if trace.checksum != found.trace.checksum:
        raise changed_error(source.name)


def code_points(vocab: Vocab) -> NDArray[np.int64]:
    """Return the (V,) bytes or code points of the vocabulary's symbols."""
    return np.arange(256) if vocab.kind == "bytes" else np.array([ord(symbol) for symbol in vocab.symbols], np.int64)


def has_id(symbols: NDArray[np.int64], vocab: Vocab) -> NDArray[np.bool_]:
    """Return (S,): whether the vocabulary has each of `symbols` (S,), which are bytes or code points."""
    return np.isin(symbols, code_points(vocab))
