"""A corpus cut into tasks of a few MB, each of which any process can read by itself: what is cut, and how it is read.

A task is a tuple of segments; a segment is a document, or a range of one that is cut where that changes nothing.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from charrnn.data.decoding import Piece, Rules, TextDecoder, detected, is_utf8, last_cut, last_cut_of_utf8
from charrnn.data.parts import Part
from charrnn.errors import CorpusError
from charrnn.io import Advance, reading

TASK_BYTES = 4 << 20  # more than a byte order mark, so that no task of a cut document is without text
PIECE_BYTES = 128 << 10  # what becomes of it fits a core's cache
_MARK_BYTES = 3  # UTF-8's byte order mark, which would be a task without text
WINDOW_BYTES = 64 << 10  # looked through for a place to cut
_WIDEST_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    """What a task reads in one go.

    name: for messages. content: the file, of which `size` bytes from `start` are meant; or the bytes from byte `start`
    of one; or text. encoding: a codec, or auto. begins, ends: whether a document does so here. replaced: how many
    invalid sequences were replaced in the text before it came here, the first of the document at `replaced_at`.
    """

    name: str
    content: Path | bytes | str
    start: int = 0
    size: int = 0
    encoding: str = "auto"
    begins: bool = True
    ends: bool = True
    replaced: int = 0
    replaced_at: int = 0


Task = tuple[Segment, ...]


@dataclass
class Trace:
    """What reading a task leaves behind.

    checksum: CRC-32 of what was read. replaced: how many invalid sequences were; replaced_at: where the first was.
    """

    checksum: int = 0
    replaced: int = 0
    replaced_at: str = ""

    def add(self, count: int, name: str, offset: int) -> None:
        """Counts replaced sequences, of which the first is at `offset` of the file `name`."""
        if count and not self.replaced:
            self.replaced_at = f"byte {offset} of {name}"
        self.replaced += count


def changed(name: str) -> CorpusError:
    """The error for a corpus that did not stay as it was."""
    return CorpusError(f"{name} changed while it was read; run again when nothing writes to it")


# ---- cutting


def tasks(parts: Iterable[Part], rules: Rules, advance: Advance) -> Iterator[Task]:
    """The parts cut into tasks. advance: called with the bytes of parts that are read here, not by a task."""
    gathered: list[Segment] = []
    size = 0
    for part in parts:
        for segment in _segments(part, rules, advance):
            gathered.append(segment)
            size += segment.size
            if size >= TASK_BYTES:
                yield tuple(gathered)
                gathered, size = [], 0
    if gathered:
        yield tuple(gathered)


def bytes_on_disk(task: Task) -> int:
    """How many bytes of files the task itself reads."""
    return sum(segment.size for segment in task if isinstance(segment.content, Path))


def _segments(part: Part, rules: Rules, advance: Advance) -> Iterator[Segment]:
    if part.documents is not None and (rules.document_end or not rules.binary):
        for text in part.documents(advance):
            yield from [Segment(part.name, text.encode())] if rules.binary else _of_text(part.name, text)
    elif part.path is None:
        yield from _of_stream(part, rules, advance)
    elif part.size <= TASK_BYTES:
        yield Segment(part.name, part.path, 0, part.size, rules.encoding)
    else:
        yield from _of_file(part, part.path, rules, advance)


def _of_text(name: str, text: str) -> Iterator[Segment]:
    start = 0
    while len(text) - start > TASK_BYTES:
        size = last_cut(text[start : start + TASK_BYTES]) or _uncut(name, start)
        yield Segment(name, text[start : start + size], size=size, begins=start == 0, ends=False)
        start += size
    yield Segment(name, text[start:], size=len(text) - start, begins=start == 0)


def _of_file(part: Part, path: Path, rules: Rules, advance: Advance) -> Iterator[Segment]:
    with reading(path), path.open("rb") as file:
        encoding = detected(file.read(4)) if rules.encoding == "auto" else rules.encoding
        if not (rules.binary or is_utf8(encoding)):
            yield from _of_decoded(part.name, part.chunks(advance), encoding, rules)
            return
        start = 0
        while start < part.size:
            stop = start + TASK_BYTES
            if stop < part.size and not rules.binary:
                stop += _cut_after(file, stop, part.name)
            stop = min(stop, part.size)
            yield Segment(part.name, path, start, stop - start, encoding, start == 0, stop == part.size)
            start = stop


def _cut_after(file: BinaryIO, offset: int, name: str) -> int:
    """How many bytes after `offset` the file can be cut."""
    size = WINDOW_BYTES
    while True:
        file.seek(offset)
        window = file.read(size)
        if cut := last_cut_of_utf8(window):
            return cut
        if len(window) < size:
            return len(window)
        if size >= _WIDEST_WINDOW_BYTES:
            _uncut(name, offset)
        size *= 4


def _uncut(name: str, offset: int) -> int:
    what = f"no line end, and nothing else that ends a character for sure, in {_WIDEST_WINDOW_BYTES} bytes"
    raise CorpusError(f"{name} has {what} near {offset}; leave it out, or read bytes with --set data.vocab=bytes")


def _of_stream(part: Part, rules: Rules, advance: Advance) -> Iterator[Segment]:
    """The segments of what can only be read from its beginning to its end: its bytes go with them."""
    chunks = part.chunks(advance)
    held, start, encoding = bytearray(), 0, rules.encoding
    for chunk in chunks:
        held += chunk
        if len(held) < TASK_BYTES:
            continue
        if start == 0 and not rules.binary:
            encoding = detected(bytes(held[:4])) if rules.encoding == "auto" else rules.encoding
            if not is_utf8(encoding):
                yield from _of_decoded(part.name, chain((bytes(held),), chunks), encoding, rules)
                return
        window = bytes(held[-_WIDEST_WINDOW_BYTES:])
        cut = len(window) if rules.binary else last_cut_of_utf8(window)
        if not cut and len(held) > TASK_BYTES + _WIDEST_WINDOW_BYTES:
            _uncut(part.name, start)
        cut += (len(held) - len(window)) * (cut > 0)
        if cut > (0 if start else _MARK_BYTES):
            yield Segment(part.name, bytes(held[:cut]), start, cut, encoding, start == 0, ends=False)
            start += cut
            del held[:cut]
    yield Segment(part.name, bytes(held), start, len(held), encoding, start == 0)


def _of_decoded(name: str, chunks: Iterator[bytes], encoding: str, rules: Rules) -> Iterator[Segment]:
    """The segments of text in a codec that only this process, from the beginning on, can decode."""
    decoder = TextDecoder(replace(rules, newlines="keep", normalize="none"), name, encoding=encoding)
    held, begins, told = "", True, 0
    for chunk in chain(chunks, (b"",)):
        piece = decoder.feed(chunk, final=not chunk)
        held += piece.raw().decode() if piece else ""
        cut = last_cut(held) if chunk and len(held) >= TASK_BYTES else 0
        if cut or not chunk:
            cut = cut or len(held)
            new = decoder.replaced - told
            yield Segment(name, held[:cut], 0, cut, "", begins, not chunk, new, decoder.first_replaced)
            held, begins, told = held[cut:], False, decoder.replaced
        elif len(held) > TASK_BYTES + _WIDEST_WINDOW_BYTES:
            _uncut(name, 0)


# ---- reading


def read(task: Task, rules: Rules, trace: Trace) -> Iterator[tuple[bool, Piece]]:
    """The task's pieces in order, each with whether a document begins with it.

    After a document stands its end, where the rules have one. Raises: CorpusError for what can't be read or decoded,
    and for a document that has such an end in it.
    """
    end = rules.document_end
    for segment in task:
        trace.add(segment.replaced, segment.name, segment.replaced_at)
        empty = True
        for piece in _pieces(segment, rules, trace):
            if end and piece.holds(end):
                remedy = "set data.document_end to a character that no text has"
                raise CorpusError(f"{segment.name} has the document end {end!r} inside of a text; {remedy}")
            yield empty and segment.begins, piece
            empty = False
        if end and segment.ends and not (empty and segment.begins):
            yield False, Piece(utf8=end.encode()) if end.isascii() else Piece(text=end)


def raw_chunks(segment: Segment, trace: Trace) -> Iterator[bytes]:
    """The segment's bytes as they are. Raises: CorpusError when the file cannot be read, or has become shorter."""
    if not isinstance(segment.content, Path):
        content = segment.content
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        trace.checksum = zlib.crc32(raw, trace.checksum)
        for start in range(0, len(raw), PIECE_BYTES):
            yield raw[start : start + PIECE_BYTES]
        return
    left = segment.size
    with reading(segment.content), segment.content.open("rb", buffering=0) as file:
        file.seek(segment.start)
        while left:
            chunk = file.read(min(left, PIECE_BYTES))
            if not chunk:
                raise changed(segment.name)
            trace.checksum = zlib.crc32(chunk, trace.checksum)
            left -= len(chunk)
            yield chunk


def _pieces(segment: Segment, rules: Rules, trace: Trace) -> Iterator[Piece]:
    if rules.binary:
        yield from (Piece(utf8=chunk) for chunk in raw_chunks(segment, trace))
        return
    if isinstance(segment.content, str):
        decoder = TextDecoder(rules, segment.name, begins=False)
        trace.checksum = zlib.crc32(segment.content.encode("utf-8", "surrogatepass"), trace.checksum)
        text = segment.content
        starts = range(0, len(text), PIECE_BYTES)
        found = (decoder.feed_text(text[i : i + PIECE_BYTES], i == starts[-1]) for i in starts)
    else:
        encoding, begins = segment.encoding, segment.begins
        decoder = TextDecoder(rules, segment.name, encoding=encoding, begins=begins, offset=segment.start)
        chunks = chain(raw_chunks(segment, trace), (b"",))
        found = (decoder.feed(chunk, final=not chunk) for chunk in chunks)
    yield from (piece for piece in found if piece)
    trace.add(decoder.replaced, segment.name, decoder.first_replaced)
