"""Part and Source: a corpus as it lies on disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.io import read_chunks

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Part:
    """A piece of a corpus: one document, or the many of a file of records.

    Attributes:
        name: For messages.
        path: The file that it is read from; None = another library's.
        size: Bytes that `chunks` yields, for progress; 0 = unknown.
        chunks: Yields the decompressed bytes; raises CorpusError, as `documents` does, for a file that is unreadable
            or damaged.
        documents: Yields the texts of the records; `chunks` then yields the same as UTF-8, a line break after each.
    """

    name: str
    path: Path | None
    size: int
    chunks: Callable[[], Iterator[bytes]]
    documents: Documents | None = None


@dataclass(frozen=True)
class Source:
    """The parts of a corpus, in order.

    Attributes:
        name: Short, and safe in file names.
        parts: What the corpus is joined from.
        notes: Lines that the user should read.
    """

    name: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all parts; 0 = unknown."""
        sizes = [part.size for part in self.parts]
        return sum(sizes) if all(sizes) else 0


def plain_part(path: Path) -> Part:
    """Return the part that is a plain text file. Raises: OSError."""
    return Part(str(path), path, path.stat().st_size, partial(read_chunks, path))


def record_part(name: str, path: Path | None, documents: Documents) -> Part:
    """Return a part of records."""

    def lines() -> Iterator[bytes]:
        for text in documents():
            yield (text if text.endswith("\n") else f"{text}\n").encode()

    return Part(name, path, 0, lines, documents)
