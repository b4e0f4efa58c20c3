"""Part and Source: a corpus as it lies on disk. Picklable, so that `read` functions are never closures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.io import Advance, read_chunks, reading

Chunks = Callable[[Advance], Iterator[bytes]]
Documents = Callable[[Advance], Iterator[str]]


@dataclass(frozen=True)
class Part:
    """A piece of a corpus: one document, or the many of a file of records.

    Attributes:
        name: For messages.
        path: A plain file whose bytes are the text, so that processes can read ranges of it; None = a stream.
        size: Bytes on disk, for progress.
        chunks: Yields the decompressed bytes. Called, as `documents` is, with a function that it calls with the bytes
            read from disk; both raise CorpusError for a file that is unreadable or damaged.
        documents: Yields the texts of the records; `chunks` then yields the same as UTF-8, a line break after each.
    """

    name: str
    path: Path | None
    size: int
    chunks: Chunks
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
        """Bytes on disk of all parts."""
        return sum(part.size for part in self.parts)


def plain_part(path: Path) -> Part:
    """Return the part that is a plain text file. Raises: CorpusError."""
    return Part(str(path), path, size_of(path), partial(_read_plain, path))


def record_part(name: str, size: int, documents: Documents) -> Part:
    """Return a part of records."""
    return Part(name, None, size, partial(_as_lines, documents), documents)


def size_of(path: Path) -> int:
    """Return a file's bytes. Raises: CorpusError."""
    with reading(path):
        return path.stat().st_size


def _read_plain(path: Path, advance: Advance) -> Iterator[bytes]:
    for chunk in read_chunks(path):
        advance(len(chunk))
        yield chunk


def _as_lines(documents: Documents, advance: Advance) -> Iterator[bytes]:
    for text in documents(advance):
        yield (text if text.endswith("\n") else f"{text}\n").encode()
