"""Pass two over a corpus, task by task on all cores: its ids, each task's at their own place in one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from charrnn.data.decoding import Piece, Rules
from charrnn.data.scanning import NEWLINE, Block, Scan, code_points, has_id, parted
from charrnn.data.segments import Task, Trace, bytes_on_disk, changed, read, tasks
from charrnn.data.workers import Workers
from charrnn.io import Advance
from charrnn.vocab import Vocab

if TYPE_CHECKING:  # workers import this module, and need not know where a corpus comes from
    from charrnn.data.sources import Source

_Item = tuple[Task, Block, int]


@dataclass(frozen=True)
class IdTable:
    """From symbols to ids as they are stored. top: the highest symbol that has an id.

    ids: (top + 2,) by symbol, the last one for all that are higher; what has none of its own has the replacement's.
    known: (top + 2,) which have one; None when those that have none are not skipped.
    """

    ids: NDArray[np.unsignedinteger]
    known: NDArray[np.bool_] | None

    @classmethod
    def of(cls, vocab: Vocab, *, skip: bool) -> "IdTable":
        """The table of a vocabulary. skip: what it lacks is left out."""
        symbols = code_points(vocab)  # (V,)
        own = np.arange(len(symbols))
        other = vocab.symbols.index(vocab.replacement) if vocab.replacement is not None else 0
        ids = np.full(int(symbols.max()) + 2, other, stored_dtype(vocab))
        ids[symbols] = own
        known = np.zeros(len(ids), bool)
        known[symbols] = True
        return cls(ids, known if skip else None)

    def of_piece(self, piece: Piece) -> NDArray[np.unsignedinteger]:
        """(n,) the ids of a piece of n symbols, of which skipped ones have none."""
        if piece.text is None and self.known is None and self.ids.itemsize == 1:
            return np.frombuffer(piece.raw().translate(self._of_bytes), np.uint8)
        symbols = piece.symbols()  # (n,)
        if self.known is not None:
            symbols = symbols[self.known.take(symbols, mode="clip")]
        return self.ids.take(symbols, mode="clip")

    @cached_property
    def _of_bytes(self) -> bytes:
        return self.ids.take(np.arange(256), mode="clip").tobytes()


def stored_dtype(vocab: Vocab) -> np.dtype:
    """The type of a vocabulary's ids on disk: unsigned, as narrow as can be, little-endian."""
    return vocab.dtype.newbyteorder("<")


@dataclass(frozen=True)
class _Encode:
    rules: Rules
    table: IdTable
    path: Path

    def __call__(self, item: _Item) -> bool:
        """Writes a task's ids. Returns whether the task is still what pass one found."""
        task, block, place = item
        trace, count, last = Trace(), 0, None
        with self.path.open("r+b", buffering=0) as file:
            file.seek(place * self.table.ids.itemsize)
            if block.separated:
                self._write(file, NEWLINE)
            for begins, piece in read(task, self.rules, trace):
                if begins and last and parted(self.rules) and not last.ends_line():
                    count += self._write(file, NEWLINE)
                count += self._write(file, piece)
                last = piece
        return (count, trace.checksum) == (block.ids, block.checksum)

    def _write(self, file: RawIOBase, piece: Piece) -> int:
        ids = self.table.of_piece(piece)
        left = ids.view(np.uint8).data
        while len(left):  # an unbuffered file may take a part
            left = left[file.write(left) or 0 :]
        return len(ids)


def num_ids(found: Scan, vocab: Vocab, *, skip: bool) -> int:
    """How many ids the corpus will have. skip: symbols that the vocabulary lacks get none."""
    return int(found.counts[has_id(found.symbols, vocab)].sum()) if skip else found.num_chars


def encode(
    source: "Source",
    rules: Rules,
    workers: Workers,
    advance: Advance,
    found: Scan,
    table: IdTable,
    path: Path,
) -> None:
    """Pass two: the ids of `found` by `table`, into the new file `path`.

    Raises: CorpusError when the corpus is no longer what pass one found; OSError when the file can't be written.
    """
    newline = len(table.of_piece(NEWLINE))
    places = _places(found.blocks, newline)
    with path.open("wb") as file:
        file.truncate(places[-1] * table.ids.itemsize)
    numbered = enumerate(tasks(source.parts, rules, advance))

    def items() -> Iterator[_Item]:
        for number, task in numbered:
            if number >= len(found.blocks):
                raise changed(source.name)
            yield task, found.blocks[number], places[number]

    done = 0
    for (task, _, _), same in workers.map(_Encode(rules, table, path), items()):
        if not same:
            raise changed(source.name)
        advance(bytes_on_disk(task))
        done += 1
    if done < len(found.blocks):
        raise changed(source.name)


def _places(blocks: tuple[Block, ...], newline: int) -> list[int]:
    """Where the ids of each block begin, and where the last end. newline: how many ids one has, 1 or 0."""
    places = [0]
    for block in blocks:
        places.append(places[-1] + block.ids + block.separated * newline)
    return places
