"""Pass one over a corpus, task by task on all cores: its checksum, and how often each symbol occurs (S of them)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from charrnn.data.decoding import Piece, Rules
from charrnn.data.segments import Task, Trace, bytes_on_disk, changed, raw_chunks, read, tasks
from charrnn.data.workers import Workers
from charrnn.io import Advance
from charrnn.vocab import Vocab

if TYPE_CHECKING:  # workers import this module, and need not know where a corpus comes from
    from charrnn.data.sources import Source

# Below this, starting workers (0.2 s) takes longer than they save.
PARALLEL_BYTES = 32 << 20
NEWLINE = Piece(utf8=b"\n")

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """What pass one found in a task. ids: how many it has. separated: a newline, not among them, is put before it."""

    ids: int
    checksum: int
    separated: bool


@dataclass(frozen=True)
class Scan:
    """What pass one found.

    sha256: of the normalised text's UTF-8 (of the bytes of a binary corpus). symbols, counts: (S,) the distinct code
    points or bytes in order, and how often each occurs. blocks: one a task. replaced: how many invalid sequences were
    replaced, and where the first was.
    """

    sha256: str
    symbols: NDArray[np.int64]
    counts: Counts
    blocks: tuple[Block, ...]
    replaced: int = 0
    replaced_at: str = ""

    @property
    def num_chars(self) -> int:
        """Symbols in the whole text."""
        return int(self.counts.sum())


@dataclass
class _Found:
    """What a worker found in a task. utf8: its normalised text; None when the task's own bytes are just that."""

    symbols: NDArray[np.int64]
    counts: Counts
    utf8: bytes | None
    opens: bool
    ends_line: bool
    trace: Trace


class _Histogram:
    """How often each symbol occurred; grows to the highest one that did."""

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
        """symbols, counts: (S,), the symbols distinct."""
        self._widen(int(symbols.max(initial=0)) + 1)
        self.counts[symbols] += counts

    def _add(self, found: Counts) -> None:
        self._widen(len(found))
        self.counts[: len(found)] += found

    def _widen(self, size: int) -> None:
        if size > len(self.counts):
            self.counts = np.concatenate([self.counts, np.zeros(size - len(self.counts), np.int64)])


@dataclass(frozen=True)
class _Count:
    """Pass one over a task."""

    rules: Rules

    def __call__(self, task: Task) -> _Found:
        histogram, trace = _Histogram(), Trace()
        collected: list[bytes] = []
        same, opens, last = True, False, None
        for begins, piece in read(task, self.rules, trace):
            if last is None:
                opens = begins
            elif begins and parted(self.rules) and not last.ends_line():
                same = False
                histogram.add(NEWLINE.symbols())
                collected.append(b"\n")
            same = same and piece.utf8 is not None
            histogram.add(piece.symbols())
            collected.append(piece.raw())
            last = piece
        same = same and sum(map(len, collected)) == sum(segment.size for segment in task)
        symbols = np.flatnonzero(histogram.counts)
        utf8 = None if same else b"".join(collected)
        return _Found(symbols, histogram.counts[symbols], utf8, opens, last is None or last.ends_line(), trace)


def parted(rules: Rules) -> bool:
    """Whether each document begins on a new line, where no other end is put after it."""
    return not rules.binary and not rules.document_end


def scan(source: "Source", rules: Rules, workers: Workers, advance: Advance, known: Vocab | None = None) -> Scan:
    """Pass one. known: the vocabulary beside which symbols get no ids; None when all will have one.

    Raises: CorpusError when the corpus cannot be read or decoded, or changes meanwhile.
    """
    digest, total, whole = hashlib.sha256(), _Histogram(), Trace()
    blocks: list[Block] = []
    ends_line = True
    for task, found in workers.map(_Count(rules), tasks(source.parts, rules, advance)):
        is_empty = not len(found.counts)
        separated = parted(rules) and found.opens and not ends_line and not is_empty
        if separated:
            digest.update(b"\n")
            total.add(NEWLINE.symbols())
        for raw in [found.utf8] if found.utf8 is not None else _again(task, found, source):
            digest.update(raw)
        total.add_counts(found.symbols, found.counts)
        kept = found.counts if known is None else found.counts[has_id(found.symbols, known)]
        blocks.append(Block(int(kept.sum()), found.trace.checksum, separated))
        whole.replaced_at = whole.replaced_at or found.trace.replaced_at
        whole.replaced += found.trace.replaced
        ends_line = ends_line if is_empty else found.ends_line
        advance(bytes_on_disk(task))
    symbols = np.flatnonzero(total.counts)
    return Scan(digest.hexdigest(), symbols, total.counts[symbols], tuple(blocks), whole.replaced, whole.replaced_at)


def _again(task: Task, found: _Found, source: "Source") -> Iterator[bytes]:
    """The task's bytes once more, for the one digest that can only be taken in order."""
    trace = Trace()
    for segment in task:
        yield from raw_chunks(segment, trace)
    if trace.checksum != found.trace.checksum:
        raise changed(source.name)


def has_id(symbols: NDArray[np.int64], vocab: Vocab) -> NDArray[np.bool_]:
    """(S,) whether the vocabulary has each of `symbols` (S,), which are bytes or code points."""
    return np.isin(symbols, code_points(vocab))


def code_points(vocab: Vocab) -> NDArray[np.int64]:
    """(V,) the bytes or code points of the vocabulary's entries."""
    return np.arange(256) if vocab.kind == "bytes" else np.array([ord(symbol) for symbol in vocab.symbols], np.int64)
