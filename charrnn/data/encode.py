"""Pass two over a corpus, task by task on all cores: its ids, each task's at their own place in one file.

Letters: V vocabulary size, n symbols of a piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from charrnn.data.parts import Source
from charrnn.data.pieces import Piece, Rules, Trace
from charrnn.data.scan import NEWLINE, Block, Scan, code_points, has_id, separates_documents
from charrnn.data.tasks import Task, bytes_on_disk, changed_error, read_task, split_tasks
from charrnn.data.workers import Workers
from charrnn.io import Advance
from charrnn.vocab import Vocab


def num_ids(found: Scan, vocab: Vocab, *, skip: bool) -> int:
    """Return how many ids the corpus will have. skip: symbols missing from the vocabulary get none."""
    return int(found.counts[has_id(found.symbols, vocab)].sum()) if skip else found.num_chars


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

    def encode(self, piece: Piece) -> NDArray[np.unsignedinteger]:
        """Return the (n,) ids of a piece; skipped symbols have none."""
        if piece.text is None and self.known is None and self.ids.itemsize == 1:
            return np.frombuffer(piece.raw().translate(self._of_bytes), np.uint8)
        symbols = piece.symbols()  # (n,)
        if self.known is not None:
            symbols = symbols[self.known.take(symbols, mode="clip")]
        return self.ids.take(symbols, mode="clip")

    @cached_property
    def _of_bytes(self) -> bytes:
        return self.ids.take(np.arange(256), mode="clip").tobytes()


@dataclass(frozen=True)
class _Encode:
    """Pass two over a task, in a worker: write its ids at their place in the file."""

    rules: Rules
    table: IdTable
    path: Path

    def __call__(self, item: tuple[Task, Block, int]) -> bool:
        """Return whether the task is still what pass one found. item: task, block, index of its first id."""
        task, block, first_id = item
        trace, count, last = Trace(), 0, None
        with self.path.open("r+b", buffering=0) as file:
            file.seek(first_id * self.table.ids.itemsize)
            if block.separated:
                self._write(file, NEWLINE)
            for begins, piece in read_task(task, self.rules, trace):
                if begins and last and separates_documents(self.rules) and not last.ends_line():
                    count += self._write(file, NEWLINE)
                count += self._write(file, piece)
                last = piece
        return (count, trace.checksum) == (block.ids, block.checksum)

    def _write(self, file: RawIOBase, piece: Piece) -> int:
        ids = self.table.encode(piece)
        left = ids.view(np.uint8).data
        while len(left):  # an unbuffered file may write less than it was given
            left = left[file.write(left) or 0 :]
        return len(ids)


def encode(
    source: Source, rules: Rules, workers: Workers, advance: Advance, found: Scan, table: IdTable, path: Path
) -> None:
    """Run pass two: write the ids of a scanned corpus to the new file `path`.

    Raises:
        CorpusError: The corpus is no longer what pass one found.
        OSError: The file cannot be written.
    """
    newline_ids = len(table.encode(NEWLINE))  # 1, or 0 when newlines are skipped
    lengths = [block.ids + block.separated * newline_ids for block in found.blocks]
    first_ids = np.cumsum([0, *lengths]).tolist()
    with path.open("wb") as file:
        file.truncate(first_ids[-1] * table.ids.itemsize)

    def items() -> Iterator[tuple[Task, Block, int]]:
        for number, task in enumerate(split_tasks(source.parts, rules, advance, Trace())):
            if number >= len(found.blocks):
                raise changed_error(source.name)
            yield task, found.blocks[number], first_ids[number]

    done = 0
    for (task, _, _), unchanged in workers.map(_Encode(rules, table, path), items()):
        if not unchanged:
            raise changed_error(source.name)
        advance(bytes_on_disk(task))
        done += 1
    if done < len(found.blocks):
        raise changed_error(source.name)
