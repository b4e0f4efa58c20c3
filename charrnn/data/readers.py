"""What a file is, told by its first bytes and not by its name alone, and the parts of a corpus that are in it."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from charrnn.data.archives import Member, is_container, is_zip, members_of, read_member
from charrnn.data.compressed import compression_of, unpacked
from charrnn.data.parts import Chunks, Part, read_plain, record_part, size_of
from charrnn.data.patterns import Choice
from charrnn.data.records import DEFAULT_FIELD, check_parquet, read_json_lines, read_parquet
from charrnn.errors import CorpusError
from charrnn.io import reading

_HEAD_BYTES = 8192
_MOST_LAYERS = 3
COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}
_JSON_LINES_SUFFIXES = {".jsonl", ".ndjson"}
_PARQUET_MAGIC = b"PAR1"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # UTF-16 and UTF-32
_FOREIGN = {
    b"%PDF-": "PDF",
    b"7z\xbc\xaf\x27\x1c": "7-Zip archive",
    b"Rar!\x1a\x07": "RAR archive",
    b"\x04\x22\x4d\x18": "LZ4 file",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "Office 97 document",
    b"ARROW1\0\0": "Arrow file",
    b"SQLite format 3\0": "SQLite database",
}
BINARY = "binary"
_CONTAINER = "Office, OpenDocument, EPUB or Java file"
_NESTED = "archive or Parquet file inside of another file"


@dataclass
class Options:
    """How files are read.

    binary: as bytes, so that those without text count as well. encoding: of the texts, as in data.encoding. text_field:
    of records; "" = `text`. choice: which files of a folder, glob or archive are meant.
    """

    binary: bool = False
    encoding: str = "auto"
    text_field: str = ""
    choice: Choice = field(default_factory=Choice)

    @property
    def may_have_nul(self) -> bool:
        """Whether NUL bytes are nothing odd in a text, as in UTF-16 without a mark."""
        return self.encoding != "auto" and "a".encode(self.encoding) != b"a"


@dataclass(frozen=True)
class Text:
    """A part, or what lies in its place. relative: path for patterns and messages. odd: why it is no text, or ""."""

    relative: str
    part: Part
    odd: str = ""


@dataclass(frozen=True)
class _Stream:
    """Bytes on their way to be known. inner: the name without the suffixes of what was unpacked."""

    name: str
    inner: PurePosixPath
    path: Path | None
    size: int
    chunks: Chunks

    def head(self) -> bytes:
        """The first bytes, `_HEAD_BYTES` or all."""
        if self.path is not None:
            return _head_of(self.path)
        found = b""
        with closing(self.chunks(lambda _: None)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                found += chunk
                if len(found) >= _HEAD_BYTES:
                    break
        return found[:_HEAD_BYTES]


def is_hidden(relative: str) -> bool:
    """Whether a file in an archive is one that a folder would hide, or macOS's notes on another."""
    return any(name.startswith(".") or name == "__MACOSX" for name in relative.split("/"))


def look_into(path: Path, relative: str, options: Options) -> Iterator[Text]:
    """The texts in a file: one, or an archive's members that `options.choice` takes.

    relative: the file's path below the folder or glob.
    Raises: CorpusError when it cannot be read, is damaged, or needs a package that is not installed.
    """
    head = _head_of(path)
    if _is_parquet(path, head):
        wanted = options.text_field or DEFAULT_FIELD
        check_parquet(path, wanted)
        yield Text(relative, record_part(str(path), size_of(path), partial(read_parquet, path, wanted)))
    elif is_zip(head) and not is_container(path):
        for member in members_of(path):
            inside = f"{relative}/{member.name}"
            if is_hidden(member.name):
                yield Text(inside, _member_stream_part(member), "hidden")
            elif options.choice.takes(inside):
                yield _text_in(_member_stream(member), inside, options)
    else:
        stream = _Stream(str(path), PurePosixPath(path.name), path, size_of(path), partial(read_plain, path))
        found = _text_in(stream, relative, options)
        container = is_zip(head) and not options.binary
        yield Text(relative, found.part, _CONTAINER) if container else found


def _head_of(path: Path) -> bytes:
    with reading(path), path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _is_parquet(path: Path, head: bytes) -> bool:
    if path.suffix == ".parquet":
        return True
    if not head.startswith(_PARQUET_MAGIC) or size_of(path) < 2 * len(_PARQUET_MAGIC):
        return False
    with reading(path), path.open("rb") as file:
        file.seek(-len(_PARQUET_MAGIC), 2)
        return file.read() == _PARQUET_MAGIC


def _member_stream(member: Member) -> _Stream:
    name = f"{member.archive}/{member.name}"
    return _Stream(name, PurePosixPath(member.name), None, member.packed, partial(read_member, member))


def _member_stream_part(member: Member) -> Part:
    stream = _member_stream(member)
    return Part(stream.name, None, stream.size, stream.chunks)


def _text_in(stream: _Stream, relative: str, options: Options) -> Text:
    """What a stream holds once it is unpacked, layer by layer."""
    head = stream.head()
    for _ in range(_MOST_LAYERS):
        kind = compression_of(head)
        if not kind:
            break
        inner = stream.inner.with_suffix("") if stream.inner.suffix.lower() in COMPRESSED_SUFFIXES else stream.inner
        chunks = partial(unpacked, kind, stream.chunks, stream.name)
        stream = _Stream(stream.name, inner, None, stream.size, chunks)
        head = stream.head()
    else:
        if compression_of(head):
            raise CorpusError(f"{stream.name} is compressed more than {_MOST_LAYERS} times over; unpack it first")
    if _is_json_lines(stream, head, options):
        documents = partial(read_json_lines, stream.chunks, options.text_field or DEFAULT_FIELD, stream.name)
        return Text(relative, record_part(stream.name, stream.size, documents))
    odd = "" if options.binary else _oddness(stream, head, options)
    return Text(relative, Part(stream.name, stream.path, stream.size, stream.chunks), odd)


def _is_json_lines(stream: _Stream, head: bytes, options: Options) -> bool:
    """By name; a field that is asked for makes anything JSON lines that begins like them."""
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return stream.inner.suffix.lower() in _JSON_LINES_SUFFIXES or (bool(options.text_field) and begins)


def _oddness(stream: _Stream, head: bytes, options: Options) -> str:
    """Why bytes are no text, or ""."""
    if stream.path is None and (is_zip(head) or head.startswith(_PARQUET_MAGIC)):
        return _NESTED
    if head[257:262] == b"ustar":
        return "tar archive"
    foreign = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), "")
    if foreign or options.may_have_nul or head.startswith(_WIDE_MARKS):
        return foreign
    return BINARY if b"\0" in head else ""  # no text in UTF-8 has one near its beginning, unless it is meant
