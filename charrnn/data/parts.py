"""Part: a piece of a corpus as it lies on a disk, and the ways to read it. Sources are made of parts.

Parts cross into worker processes, so that what they hold must be picklable: the ways to read are module-level functions
with their arguments bound (functools.partial), never closures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.io import Advance, chunks_of, reading

Chunks = Callable[[Advance], Iterator[bytes]]
Documents = Callable[[Advance], Iterator[str]]


@dataclass(frozen=True)
class Part:
    """What is read as one document, or, with `documents`, as many.

    name: for messages. path: a plain file whose bytes are the text, so that several processes may read ranges of it;
    None = it must be streamed. size: bytes on disk, for progress. chunks: the bytes, decompressed, in pieces.
    documents: the records' texts; with it, `chunks` gives the same in UTF-8, each record ended by a line break. No
    piece or record is empty. Both are called with a function that they call with the bytes read from the file on disk.
    Raises, while it is read: CorpusError when the file cannot be read or is damaged.
    """

    name: str
    path: Path | None
    size: int
    chunks: Chunks
    documents: Documents | None = None


def plain_part(path: Path) -> Part:
    """A file whose bytes are the text. Raises: CorpusError when it cannot be looked at."""
    return Part(str(path), path, size_of(path), partial(read_plain, path))


def record_part(name: str, size: int, documents: Documents) -> Part:
    """A part of records. size: as in Part."""
    return Part(name, None, size, partial(_as_lines, documents), documents)


def read_plain(path: Path, advance: Advance) -> Iterator[bytes]:
    """A file's bytes as they are. advance: called with their number."""
    for chunk in chunks_of(path):
        advance(len(chunk))
        yield chunk


def _as_lines(documents: Documents, advance: Advance) -> Iterator[bytes]:
    for text in documents(advance):
        yield (text if text.endswith("\n") else f"{text}\n").encode("utf-8")


def size_of(path: Path) -> int:
    """A file's bytes. Raises: CorpusError when it cannot be looked at."""
    with reading(path):
        return path.stat().st_size
