"""From text to ids on disk: read in chunks, encoded once, memory-mapped, cut into train, val and test.

Pass one finds the alphabet and the checksum, pass two writes the ids; neither holds more than a few MB. What was
prepared once is found again by the text's checksum.
"""

import codecs
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import AnyStr

import numpy as np
from numpy.typing import NDArray

from charrnn.config import DataConfig
from charrnn.errors import CorpusError, VocabError
from charrnn.parts import Part
from charrnn.sources import Source, find_source
from charrnn.storage import Advance, byte_bar, reading, say, temporary, writing
from charrnn.vocab import Ids, Vocab
from charrnn.windows import split_bounds

MOST_SYMBOLS = 65_535  # ids are uint16 at the most
LEAST_EVALUATED = 2  # one character to predict from, one to predict
_FORMAT = 1
_CODE_POINTS = 0x110000
_BYTE_ORDER_MARK = "\ufeff"

Piece = str | bytes


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    name: short and safe in file names. source: as it was given. sha256: of the normalised text's UTF-8 bytes (of the
    raw bytes for a byte vocabulary). num_chars: N, bytes for a byte vocabulary. split: the train, val and test
    shares. ids: (N,) uint8 or uint16, read-only, on disk. notes: what the user should know, a line each.
    """

    name: str
    source: str
    vocab: Vocab
    sha256: str
    num_chars: int
    split: tuple[float, float, float]
    ids: Ids
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> Ids:
        """(N_train,) ids."""
        return self._part("train")

    @property
    def val(self) -> Ids:
        """(N_val,) ids."""
        return self._part("val")

    @property
    def test(self) -> Ids:
        """(N_test,) ids."""
        return self._part("test")

    def _part(self, name: str) -> Ids:
        return self.ids[slice(*split_bounds(self.num_chars, self.split)[name])]


@dataclass(frozen=True)
class Scan:
    """What pass one found. sha256 and num_chars as in Corpus; symbols: the distinct code points or bytes, sorted."""

    sha256: str
    num_chars: int
    symbols: tuple[int, ...]


def prepare(data: DataConfig, *, progress: bool = False) -> Corpus:
    """The corpus that `data` names, encoded and memory-mapped; every rank may call it, one of a machine first.

    progress: tell on stderr what goes on. The environment's CHARRNN_DATA_MIRROR stands in for an empty data.mirror.
    Raises: CorpusError when there is no such corpus, or it cannot be brought, read, stored or used.
    """
    cache_dir = Path(data.cache_dir).expanduser()
    mirror = data.mirror or os.environ.get("CHARRNN_DATA_MIRROR", "")
    binary = data.vocab == "bytes"
    source = find_source(
        data.source,
        cache_dir,
        mirror=mirror,
        binary=binary,
        text_field=data.text_field,
        include=data.include,
        exclude=data.exclude,
        progress=progress,
    )
    for note in source.notes:
        say(note, progress)
    end = data.document_end or None
    scan = _scan(source, binary, end, progress)
    _refuse_unusable(data, scan)
    vocab = Vocab.of_bytes(end) if binary else Vocab.of_chars(map(chr, scan.symbols), end)
    entry = cache_dir / "prepared" / f"{scan.sha256[:16]}-{data.vocab}"
    if not _is_whole(entry, scan, vocab):
        _write_entry(entry, source, scan, vocab, progress)
    with reading(entry):
        ids = np.memmap(entry / "ids.bin", _stored_dtype(vocab), mode="r")  # (N,)
    return Corpus(source.name, data.source, vocab, scan.sha256, scan.num_chars, data.split, ids, source.notes)


def _scan(source: Source, binary: bool, end: str | None, progress: bool) -> Scan:
    digest = hashlib.sha256()
    num_chars = 0
    seen = np.zeros(_CODE_POINTS, bool)
    with byte_bar(f"reading {source.name}", source.size, progress) as advance:
        for piece in _pieces(source, binary, end, advance):
            digest.update(_raw(piece))
            num_chars += len(piece)
            seen[_symbols(piece)] = True
    return Scan(digest.hexdigest(), num_chars, tuple(np.flatnonzero(seen).tolist()))


def _pieces(source: Source, binary: bool, end: str | None, advance: Advance) -> Iterator[Piece]:
    return read_bytes(source.parts, advance, end) if binary else read_text(source.parts, advance, end)


def _raw(piece: Piece) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode("utf-8")


def _symbols(piece: Piece) -> NDArray[np.unsignedinteger]:
    """(len(piece),) the code points of a text, or the bytes."""
    if isinstance(piece, bytes):
        return np.frombuffer(piece, np.uint8)
    return np.frombuffer(piece.encode("utf-32-le"), "<u4")


def read_bytes(parts: Iterable[Part], advance: Advance, end: str | None = None) -> Iterator[bytes]:
    """The parts' bytes in pieces, one part right after the other. advance, end: as for read_text; `end` is ASCII."""
    for part in parts:
        if not end:
            yield from part.chunks(advance)
        elif part.documents is None:
            yield from _closed(part.chunks(advance), end.encode(), part.name)
        else:
            for document in part.documents(advance):
                yield from _closed([document.encode("utf-8")], end.encode(), part.name)


def read_text(parts: Iterable[Part], advance: Advance, end: str | None = None) -> Iterator[str]:
    """The parts' text in pieces, with \\n as the only line end.

    Each document begins on a new line; with `end`, that character stands after each document instead.
    advance: called with the bytes read from disk.
    Raises: CorpusError at the first byte that is not UTF-8, and for a document that has `end` in it.
    """
    last = "\n"
    for part in parts:
        for document in _documents(part, advance):
            first = True
            for piece in _closed(document, end, part.name) if end else document:
                if first and last != "\n" and not end:
                    yield "\n"
                first, last = False, piece[-1]
                yield piece


def _documents(part: Part, advance: Advance) -> Iterator[Iterable[str]]:
    """The part's documents, each in pieces none of which is empty."""
    if part.documents is None:
        yield _decoded(part, advance)
    else:
        for document in part.documents(advance):
            yield [document.replace("\r\n", "\n").replace("\r", "\n")]


def _closed(document: Iterable[AnyStr], end: AnyStr, name: str) -> Iterator[AnyStr]:
    """A document's pieces, and `end` after the last; nothing of one that is empty."""
    empty = True
    for piece in document:
        if end in piece:
            remedy = "set data.document_end to a character that no text has"
            raise CorpusError(f"{name} has the document end {end!r} inside of a text; {remedy}")
        empty = False
        yield piece
    if not empty:
        yield end


def _decoded(part: Part, advance: Advance) -> Iterator[str]:
    """A part's text in pieces, none of them empty, without its byte order mark."""
    utf8 = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset, begun = 0, False
    for chunk in chain(part.chunks(advance), (b"",)):  # the last, empty one flushes both decoders
        held_back = len(utf8.getstate()[0])
        try:
            text = utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where = f"byte 0x{error.object[error.start]:02x} at offset {offset - held_back + error.start}"
            remedy = "convert the file, leave it out, or read bytes with --set data.vocab=bytes"
            raise CorpusError(f"{part.name} is not UTF-8 text: {where}; {remedy}") from error
        offset += len(chunk)
        if text and not begun:
            begun, text = True, text.removeprefix(_BYTE_ORDER_MARK)
        if piece := newlines.decode(text, final=not chunk):
            yield piece


def _refuse_unusable(data: DataConfig, scan: Scan) -> None:
    if not scan.num_chars:
        raise CorpusError(f"the corpus {data.source} is empty; name a text with something in it")
    if len(scan.symbols) == 1:
        what = f"{scan.num_chars} times the symbol {chr(scan.symbols[0])!r}"
        raise CorpusError(f"the corpus {data.source} is {what} and nothing else; there is nothing to learn from it")
    if len(scan.symbols) > MOST_SYMBOLS:
        what = f"{len(scan.symbols)} different characters, and ids go up to {MOST_SYMBOLS} symbols"
        raise CorpusError(f"the corpus {data.source} has {what}; read bytes with --set data.vocab=bytes")
    bounds = split_bounds(scan.num_chars, data.split)
    for (part, (start, stop)), fraction in zip(bounds.items(), data.split, strict=True):
        if part != "train" and fraction > 0 and stop - start < LEAST_EVALUATED:
            what = f"{fraction:g} of {scan.num_chars} characters is {stop - start}"
            remedy = f"evaluation needs {LEAST_EVALUATED}; use a longer text or another data.split"
            raise CorpusError(f"the {part} split of {data.source} is too small: {what}, and {remedy}")


def _write_entry(entry: Path, source: Source, scan: Scan, vocab: Vocab, progress: bool) -> None:
    """Makes the cache entry `entry` under a temporary name and renames it; safe beside others that do the same."""
    with writing(entry.parent), temporary(entry) as folder:
        folder.mkdir()
        _write_ids(folder / "ids.bin", source, scan, vocab, progress)
        meta = _meta(scan, vocab) | {"sources": [part.name for part in source.parts]}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if entry.exists() and not _is_whole(entry, scan, vocab):
            say(f"{entry} was damaged, so that it is made again", progress)
            shutil.rmtree(entry)
        try:
            folder.rename(entry)
        except OSError:
            if not _is_whole(entry, scan, vocab):  # else another process was faster, with the same ids
                raise


def _write_ids(path: Path, source: Source, scan: Scan, vocab: Vocab, progress: bool) -> None:
    digest = hashlib.sha256()
    changed = CorpusError(f"{source.name} changed while it was read; run again when nothing writes to it")
    with path.open("wb") as file, byte_bar(f"encoding {source.name}", source.size, progress) as advance:
        for piece in _pieces(source, vocab.kind == "bytes", vocab.document_end, advance):
            digest.update(_raw(piece))
            try:
                ids = _symbols(piece) if isinstance(piece, bytes) else vocab.encode(piece)  # (len(piece),)
            except VocabError:
                raise changed from None
            file.write(ids.astype(_stored_dtype(vocab), copy=False).tobytes())
    if digest.hexdigest() != scan.sha256:
        raise changed


def _stored_dtype(vocab: Vocab) -> np.dtype:
    return vocab.dtype.newbyteorder("<")


def _meta(scan: Scan, vocab: Vocab) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "sha256": scan.sha256,
        "num_chars": scan.num_chars,
        "dtype": _stored_dtype(vocab).str,
        "vocab": vocab.to_json(),
    }


def _is_whole(entry: Path, scan: Scan, vocab: Vocab) -> bool:
    """Whether `entry` holds the ids of this text, all of them."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        size = (entry / "ids.bin").stat().st_size
    except (OSError, ValueError):
        return False
    as_meant = isinstance(meta, dict) and _meta(scan, vocab).items() <= meta.items()
    return as_meant and size == scan.num_chars * vocab.dtype.itemsize
