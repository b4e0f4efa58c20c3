"""What a file is, by its first bytes and not by its name alone, and the parts of a corpus in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from charrnn.config import DataConfig
from charrnn.data.parts import Part, plain_part, record_part
from charrnn.data.records import DEFAULT_FIELD, check_parquet, read_json_lines, read_parquet
from charrnn.data.streams import Stream, compression_of, open_zip, zip_members
from charrnn.errors import CorpusError

_HEAD_BYTES = 8192
_MAX_LAYERS = 3
COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}
_JSON_LINES_SUFFIXES = {".jsonl", ".ndjson"}
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
# Members that Word, OpenDocument, EPUB and Java files, which are zip archives, have.
_CONTAINER_MEMBERS = {"[Content_Types].xml", "mimetype", "META-INF/MANIFEST.MF"}
_PARQUET_MAGIC = b"PAR1"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # of UTF-16 and UTF-32
_FOREIGN = {b"%PDF-": "PDF", b"7z\xbc\xaf\x27\x1c": "7-Zip archive", b"Rar!\x1a\x07": "RAR archive"}
BINARY = "binary"
HIDDEN = "hidden"
_CONTAINER = "Office, OpenDocument, EPUB or Java file"
_NESTED = "archive or Parquet file inside of another file"


@dataclass(frozen=True)
class Candidate:
    """A part that a corpus may take.

    Attributes:
        path: Relative path, for patterns and messages.
        part: The part.
        skip_reason: Why it is not text, or "".
    """

    path: str
    part: Part
    skip_reason: str = ""


def stem_of(path: PurePath) -> str:
    """Return a file's name without its suffix, or suffixes where it is compressed."""
    return PurePath(path.stem).stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.stem


def read_file(
    path: Path, relative: str, data: DataConfig, *, binary: bool, select: Callable[[str], bool]
) -> Iterator[Candidate]:
    """Find the texts in a file: one, or the members of a zip archive.

    Args:
        path: File.
        relative: Its path below the folder or glob.
        data: Encoding and field of records.
        binary: Whether files are read as bytes, so that those without text count as well.
        select: Whether to take the archive member with a relative path.

    Raises:
        CorpusError: The file is damaged, or needs a package that is not installed.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    is_zip = head.startswith(_ZIP_MAGIC)
    if path.suffix == ".parquet" or head.startswith(_PARQUET_MAGIC):
        field = data.text_field or DEFAULT_FIELD
        check_parquet(path, field)
        yield Candidate(relative, record_part(str(path), path, partial(read_parquet, path, field)))
    elif is_zip and _CONTAINER_MEMBERS.isdisjoint(open_zip(path).namelist()):
        for member in zip_members(path):
            inside = f"{relative}/{member.inner}"
            if _is_hidden(member.inner):
                yield Candidate(inside, _stream_part(member), HIDDEN)
            elif select(inside):
                yield _candidate(member, inside, data, binary)
    else:
        found = _candidate(Stream(path, path.stat().st_size, path.name), relative, data, binary)
        yield replace(found, skip_reason=_CONTAINER) if is_zip and not binary else found


def _is_hidden(member: str) -> bool:
    """Return whether a folder would hide the file; __MACOSX holds macOS's metadata of the others."""
    return any(name.startswith(".") or name == "__MACOSX" for name in member.split("/"))


def _candidate(stream: Stream, relative: str, data: DataConfig, binary: bool) -> Candidate:
    """Unwrap the layers of compression, and find out what is inside."""
    inner = PurePosixPath(stream.inner)
    while kind := compression_of(head := stream.head(_HEAD_BYTES)):
        if len(stream.layers) == _MAX_LAYERS:
            raise CorpusError(f"{stream.name} is compressed more than {_MAX_LAYERS} times over; unpack it first")
        stream = replace(stream, layers=(*stream.layers, kind))
        inner = inner.with_suffix("") if inner.suffix.lower() in COMPRESSED_SUFFIXES else inner
    if _is_json_lines(inner, head, data.text_field):
        documents = partial(read_json_lines, stream, data.text_field or DEFAULT_FIELD)
        return Candidate(relative, record_part(stream.name, stream.path, documents))
    is_plain = not stream.layers and stream.member < 0
    part = plain_part(stream.path) if is_plain else _stream_part(stream)
    return Candidate(relative, part, "" if binary else _skip_reason(head, data.encoding, is_plain))


def _stream_part(stream: Stream) -> Part:
    return Part(stream.name, stream.path, 0, stream.chunks)


def _is_json_lines(inner: PurePosixPath, head: bytes, text_field: str) -> bool:
    """By name; with data.text_field also by the first character."""
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return inner.suffix.lower() in _JSON_LINES_SUFFIXES or (bool(text_field) and begins)


def _skip_reason(head: bytes, encoding: str, is_plain: bool) -> str:
    """Return why bytes are not text, or ""."""
    if not is_plain and head.startswith((*_ZIP_MAGIC, _PARQUET_MAGIC)):
        return _NESTED
    if head[257:262] == b"ustar":
        return "tar archive"
    may_have_nul = encoding != "auto" and "a".encode(encoding) != b"a"  # as UTF-16 has
    foreign = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), "")
    if foreign or may_have_nul or head.startswith(_WIDE_MARKS):
        return foreign
    return BINARY if b"\0" in head else ""  # UTF-8 text has none near its beginning, unless it is intended
