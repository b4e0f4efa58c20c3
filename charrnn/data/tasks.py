"""A corpus split into tasks of a few MB that any process can read on its own: how it is split, and how a task is read.

A task is a tuple of segments; a segment is a document or a range of one, split where that does not change its text.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NoReturn

from charrnn.data.decode import Utf8Decoder, detect_encoding, is_utf8, last_cut, transcode
from charrnn.data.parts import Part
from charrnn.data.pieces import Piece, Rules, Trace
from charrnn.errors import CorpusError
from charrnn.io import Advance, reading

TASK_BYTES = 4 << 20
PIECE_BYTES = 128 << 10  # what becomes of it fits a core's cache
WINDOW_BYTES = 64 << 10  # searched for a place to split
_MAX_WINDOW_BYTES = 1 << 20
_MARK_BYTES = 3  # UTF-8's byte order mark; a segment of nothing else would have no text


@dataclass(frozen=True)
class Segment:
    """What a task reads in one go.

    Attributes:
        name: File, for messages.
        content: The file, or UTF-8 bytes (any bytes of a binary corpus).
        start: Byte offset in the file.
        size: Bytes.
        encoding: Codec of the file, or auto.
        begins: Whether a document begins here.
        ends: Whether it ends here.
    """

    name: str
    content: Path | bytes
    start: int = 0
    size: int = 0
    encoding: str = "utf-8"
    begins: bool = True
    ends: bool = True


Task = tuple[Segment, ...]


def changed_error(name: str) -> CorpusError:
    """Return the error for a corpus that changed between the passes."""
    return CorpusError(f"{name} changed while it was read; run again when nothing writes to it")


# ---- splitting


def split_tasks(parts: Iterable[Part], rules: Rules, advance: Advance, trace: Trace) -> Iterator[Task]:
    """Split the parts into tasks.

    Args:
        parts: Parts of the corpus.
        rules: The corpus's rules.
        advance: Called with the bytes on disk of what is read here and not by a task.
        trace: Records the invalid sequences replaced here.
    """
    collected: list[Segment] = []
    size = 0
    for part in parts:
        for segment in _segments(part, rules, advance, trace):
            collected.append(segment)
            size += segment.size
            if size >= TASK_BYTES:
                yield tuple(collected)
                collected, size = [], 0
    if collected:
        yield tuple(collected)


def bytes_on_disk(task: Task) -> int:
    """Return how many bytes of files the task itself reads."""
    return sum(segment.size for segment in task if isinstance(segment.content, Path))


def _segments(part: Part, rules: Rules, advance: Advance, trace: Trace) -> Iterator[Segment]:
    if part.documents is not None and (rules.document_end or not rules.binary):
        for text in part.documents(advance):
            raw = text.encode()
            chunks = (raw[start : start + TASK_BYTES] for start in range(0, len(raw), TASK_BYTES))
            yield from _split_stream(part.name, chunks, rules)
    elif part.path is None:
        yield from _split_stream(part.name, _utf8_of(part, rules, advance, trace), rules)
    elif part.size <= TASK_BYTES:
        yield Segment(part.name, part.path, 0, part.size, rules.encoding)
    else:
        yield from _split_file(part, part.path, rules, advance, trace)


def _utf8_of(part: Part, rules: Rules, advance: Advance, trace: Trace) -> Iterator[bytes]:
    chunks = part.chunks(advance)
    if rules.binary:
        return chunks
    encoding = "utf-8" if part.documents else rules.encoding
    return transcode(chunks, encoding, rules, part.name, trace)


def _split_file(part: Part, path: Path, rules: Rules, advance: Advance, trace: Trace) -> Iterator[Segment]:
    with reading(path), path.open("rb") as file:
        encoding = detect_encoding(file.read(4)) if rules.encoding == "auto" else rules.encoding
        if not (rules.binary or is_utf8(encoding)):
            yield from _split_stream(part.name, _utf8_of(part, rules, advance, trace), rules)
            return
        start = 0
        while start < part.size:
            stop = start + TASK_BYTES
            if stop < part.size and not rules.binary:
                stop += _next_cut(file, stop, rules, part.name)
            stop = min(stop, part.size)
            yield Segment(part.name, path, start, stop - start, begins=start == 0, ends=stop == part.size)
            start = stop


def _next_cut(file: BinaryIO, offset: int, rules: Rules, name: str) -> int:
    """Return how many bytes after `offset` the file can be split."""
    size = WINDOW_BYTES
    while True:
        file.seek(offset)
        window = file.read(size)
        if cut := last_cut(window, rules):
            return cut
        if len(window) < size:
            return len(window)
        if size >= _MAX_WINDOW_BYTES:
            _refuse_unsplittable(name, offset)
        size *= 4


def _refuse_unsplittable(name: str, offset: int) -> NoReturn:
    what = f"no line end, and nothing else to split it at, in {_MAX_WINDOW_BYTES} bytes"
    raise CorpusError(f"{name} has {what} near {offset}; exclude it, or read bytes with --set data.vocab=bytes")


def _split_stream(name: str, chunks: Iterator[bytes], rules: Rules) -> Iterator[Segment]:
    """Split what can only be read from start to end; the segments carry the bytes."""
    held, start = bytearray(), 0
    for chunk in chunks:
        held += chunk
        if len(held) < TASK_BYTES:
            continue
        window = bytes(held[-_MAX_WINDOW_BYTES:])
        cut = len(window) if rules.binary else last_cut(window, rules)
        if not cut and len(held) > TASK_BYTES + _MAX_WINDOW_BYTES:
            _refuse_unsplittable(name, start)
        cut += (len(held) - len(window)) * (cut > 0)
        if cut > _MARK_BYTES:
            yield Segment(name, bytes(held[:cut]), start, cut, begins=start == 0, ends=False)
            start += cut
            del held[:cut]
    yield Segment(name, bytes(held), start, len(held), begins=start == 0)


# ---- reading


def read_task(task: Task, rules: Rules, trace: Trace) -> Iterator[tuple[bool, Piece]]:
    """Read a task's pieces in order, each document followed by `rules.document_end`, if any.

    Yields:
        Whether a document begins with the piece, and the piece.

    Raises:
        CorpusError: A file cannot be read or decoded, or a document contains its end character.
    """
    end = rules.document_end
    for segment in task:
        empty = True
        for piece in _pieces(segment, rules, trace):
            if end and piece.contains(end):
                remedy = "set data.document_end to a character that no text has"
                raise CorpusError(f"{segment.name} has the document end {end!r} inside of a text; {remedy}")
            yield empty and segment.begins, piece
            empty = False
        if end and segment.ends and not (empty and segment.begins):
            yield False, Piece(utf8=end.encode()) if end.isascii() else Piece(text=end)


def raw_chunks(segment: Segment, trace: Trace) -> Iterator[bytes]:
    """Yield the segment's bytes. Raises: CorpusError when the file cannot be read, or has become shorter."""
    content = segment.content
    for chunk in _file_chunks(segment, content) if isinstance(content, Path) else _slices(content):
        trace.checksum = zlib.crc32(chunk, trace.checksum)
        yield chunk


def _slices(raw: bytes) -> Iterator[bytes]:
    return (raw[start : start + PIECE_BYTES] for start in range(0, len(raw), PIECE_BYTES))


def _file_chunks(segment: Segment, path: Path) -> Iterator[bytes]:
    left = segment.size
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(segment.start)
        while left:
            chunk = file.read(min(left, PIECE_BYTES))
            if not chunk:
                raise changed_error(segment.name)
            left -= len(chunk)
            yield chunk


def _pieces(segment: Segment, rules: Rules, trace: Trace) -> Iterator[Piece]:
    chunks, name = raw_chunks(segment, trace), segment.name
    if rules.binary:
        yield from (Piece(utf8=chunk) for chunk in chunks)
        return
    if segment.encoding == "auto" or not is_utf8(segment.encoding):
        chunks = transcode(chunks, segment.encoding, rules, name, trace)
    decoder = Utf8Decoder(rules, name, trace, begins=segment.begins, offset=segment.start)
    for chunk in chain(chunks, (b"",)):
        if piece := decoder.feed(chunk, final=not chunk):
            yield piece
