"""Compressed streams, recognised by their first bytes and unpacked a few MB at a time: gzip, bzip2, xz, Zstandard.

Nothing is unpacked to disk, and what a few bytes can swell to is bounded: no call gives more than some MB, no stream
may ask for a large window, and a file that goes on to unpack to hundreds of times its size is refused.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from charrnn import io as storage
from charrnn.data.parts import Chunks
from charrnn.errors import CorpusError
from charrnn.io import Advance

# Text packs to a tenth of its size, a log to a hundredth.
MOST_RATIO = 500
UNSUSPECTED_BYTES = 1 << 30
_MOST_WINDOW = 256 << 20
# The most that Zstandard may be given at once: a block of 4 bytes can stand for 128 KiB.
_ZSTD_INPUT = 1024
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # pi and its root, which begin and end the blocks


def compression_of(head: bytes) -> str:
    """What a file that begins with `head` is compressed with, or "". head: 10 bytes or more, if there are as many."""
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    if kind == "bzip2" and not (head[3:4].isdigit() and head[4:10] in _BZIP2_BLOCKS):
        return ""  # a text may begin with BZh
    if head[1:4] == b"\x2a\x4d\x18" and head[:1] and 0x50 <= head[0] <= 0x5F:
        return "Zstandard"  # a frame to be skipped, which some writers put first
    return kind


class Unpacker(Protocol):
    """What bz2 and lzma call a decompressor."""

    @property
    def eof(self) -> bool: ...  # noqa: D102

    @property
    def needs_input(self) -> bool: ...  # noqa: D102

    @property
    def unused_data(self) -> bytes: ...  # noqa: D102

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...  # noqa: D102


class _Gzip:
    """zlib's decompressor in the manner of bz2's."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)  # 31: a gzip header, and its checksum at the end
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = not self._zlib.unconsumed_tail and len(out) < max_length
        return out


class _Zstandard:
    """zstandard's decompressor in the manner of bz2's. It is given little at once, since it cannot be told to stop."""

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW).decompressobj()
        self._pending = memoryview(b"")
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data + bytes(self._pending)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._pending = memoryview(bytes(self._pending) + data) if data else self._pending
        pieces, length = [], 0
        while self._pending and length < max_length and not self._zstd.eof:
            piece = self._zstd.decompress(self._pending[:_ZSTD_INPUT])
            self._pending = self._pending[_ZSTD_INPUT:]
            pieces.append(piece)
            length += len(piece)
        self.needs_input = not self._pending
        return b"".join(pieces)


def _new_unpacker(kind: str) -> Callable[[], Unpacker]:
    """Raises: CorpusError when it takes a package that is not installed."""
    if kind == "Zstandard":
        try:
            import zstandard  # noqa: F401
        except ModuleNotFoundError:
            raise CorpusError(
                "reading Zstandard files (.zst) needs the package zstandard: pip install 'charrnn[data]'"
            ) from None
        return _Zstandard
    if kind == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MOST_WINDOW)
    return bz2.BZ2Decompressor if kind == "bzip2" else _Gzip


def _faults(kind: str) -> tuple[type[Exception], ...]:
    if kind == "Zstandard":
        import zstandard

        return (zstandard.ZstdError,)
    return (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError)


def unpacked(kind: str, source: Chunks, name: str, advance: Advance) -> Iterator[bytes]:
    """The bytes behind a compressed source, all streams of it if there are several, in pieces of some MB.

    kind: as `compression_of` says. advance: called with the bytes read from disk.
    Raises: CorpusError for what is damaged, cut off, or swells like a bomb.
    """
    new = _new_unpacker(kind)
    faults = _faults(kind)
    stream, begun = new(), False
    taken = given = 0
    for chunk in source(advance):
        data = chunk
        taken += len(chunk)
        while True:
            if stream.eof:
                data = stream.unused_data + data
                stream, begun = new(), False
            if not begun:
                data = data.lstrip(b"\0")  # streams may be padded with zeros
            if data or not stream.needs_input:
                begun = True
                try:
                    piece = stream.decompress(data, storage.CHUNK_BYTES)
                except faults as error:
                    raise _damaged(name, kind, str(error)) from error
                data = b""
                given += len(piece)
                refuse_bomb(name, taken, given)
                if piece:
                    yield piece
            if stream.needs_input and not stream.eof:
                break
    if begun and not stream.eof:
        raise _damaged(name, kind, "it ends in the middle")


def refuse_bomb(name: str, packed: int, size: int) -> None:
    """Raises: CorpusError when `packed` bytes unpacked to so many that no text can be behind it."""
    if size > UNSUSPECTED_BYTES and size > MOST_RATIO * packed:
        raise CorpusError(
            f"{name} unpacks to more than {MOST_RATIO} times its size, as no text does; if it is meant, unpack it "
            "and name the file"
        )


def _damaged(name: str, kind: str, reason: str) -> CorpusError:
    return CorpusError(f"{name} is a damaged {kind} file: {reason}; bring it again, or leave it out")
