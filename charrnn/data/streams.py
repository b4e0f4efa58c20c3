"""Byte streams of files and of zip members, decompressed on the fly: gzip, bzip2, xz, Zstandard.

Nothing is unpacked to disk, and memory stays bounded. fsspec's table of decompressors is not used: its bzip2 and xz
readers silently ignore what follows a stream and is not one, and nothing limits what a file expands to.
"""

import bz2
import gzip
import io
import lzma
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from charrnn import io as storage
from charrnn.errors import CorpusError
from charrnn.io import reading

# Text compresses to a tenth of its size, a log to a hundredth.
MAX_RATIO = 500
UNCHECKED_BYTES = 1 << 30  # that a file may expand to at any ratio
_MAX_XZ_MEMORY = 256 << 20
# Decompressed at once: a few bytes of input may expand to many.
_READ_BYTES = 64 << 10
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # the digits of pi and of its root, with which blocks begin and end
_ENCRYPTED = 0x1
# What the decompressors raise for damaged input, beside the OSError without an errno of bz2 and gzip.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(IndexError, ValueError, OverflowError, RuntimeError),
)


def compression_of(head: bytes) -> str:
    """Return what a file is compressed with, or "", by its first bytes (10 or more, if there are as many)."""
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    if kind == "bzip2" and not (head[3:4].isdigit() and head[4:10] in _BZIP2_BLOCKS):
        return ""  # a text may begin with BZh
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:
        return "Zstandard"  # a skippable frame, which some writers put first
    return kind


class _Concatenated(io.RawIOBase):
    """The content of a file of concatenated bzip2, xz or Zstandard streams.

    Unlike bz2.BZ2File and lzma.LZMAFile it refuses what follows a stream and is not one.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file, self._new, self._stream, self._begun = file, new, new(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._stream.eof:
                data, self._stream, self._begun = self._stream.unused_data, self._new(), False
            if self._stream.needs_input:
                data = data or self._file.read(_READ_BYTES)
                if not data:
                    if self._begun:
                        raise EOFError
                    return 0
            if not self._begun:
                data = data.lstrip(b"\0")  # streams may be padded with zeros
                if not data:
                    continue
                self._begun = True
            if piece := self._stream.decompress(data, len(buffer)):
                buffer[: len(piece)] = piece
                return len(piece)


def _decompress(kind: str, file: BinaryIO) -> BinaryIO:
    """Wrap a compressed file. Raises: CorpusError when the package for it is not installed."""
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
    new: Callable[[], Any] = bz2.BZ2Decompressor
    if kind == "xz":
        new = lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_XZ_MEMORY)  # noqa: E731
    elif kind == "Zstandard":
        new = _zstd().ZstdDecompressor
    return cast(BinaryIO, io.BufferedReader(_Concatenated(file, new), _READ_BYTES))


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        what = "reading Zstandard files (.zst) needs the package backports.zstd"
        raise CorpusError(f"{what}: pip install 'charrnn[data]'") from None
    return zstd


@dataclass(frozen=True)
class Stream:
    """The bytes of a file, or of a zip archive's member.

    Attributes:
        path: File on disk.
        size: Bytes on disk, of a member those in the archive.
        inner: Its name in the archive, or the file's.
        member: Its index in the archive; -1 = none.
        layers: Compressions around the content, outermost first.
    """

    path: Path
    size: int
    inner: str
    member: int = -1
    layers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"{self.path}/{self.inner}" if self.member >= 0 else str(self.path)

    def head(self, size: int) -> bytes:
        """Return the first bytes, at most `size`. Raises: CorpusError."""
        with self.open() as file:
            return file.read(size)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content. Raises: CorpusError, also when the file expands like a decompression bomb."""
        expanded = 0
        with self.open() as file:
            while chunk := file.read(storage.CHUNK_BYTES):
                expanded += len(chunk)
                refuse_bomb(self.name, self.size, expanded)
                yield chunk

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the content for reading. Raises: CorpusError, also in the block, when it is unreadable or damaged."""
        damage = (*_DAMAGE, _zstd().ZstdError) if "Zstandard" in self.layers else _DAMAGE
        with reading(self.path), ExitStack() as stack:
            try:
                if self.member >= 0:
                    archive = open_zip(self.path)
                    file: Any = stack.enter_context(archive.open(archive.infolist()[self.member]))
                else:
                    file = stack.enter_context(self.path.open("rb"))
                for kind in self.layers:
                    file = _decompress(kind, file)
                yield file
            except NotImplementedError as error:
                raise CorpusError(f"{self.name} uses an unsupported compression ({error}); unpack it first") from error
            except (OSError, *damage) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                kind = self.layers[-1] if self.layers else "zip"
                member = f"{self.inner}: " if self.member >= 0 else ""
                raise damaged_error(self.path, kind, f"{member}{error or 'it ends in the middle'}") from error


def damaged_error(path: Path, kind: str, reason: str) -> CorpusError:
    """Return the error for a damaged file."""
    return CorpusError(f"{path} is a damaged {kind} file: {reason}; download it again, or exclude it")


def refuse_bomb(name: str, compressed: int, expanded: int) -> None:
    """Raise CorpusError when `compressed` bytes expand to so many that they cannot be text."""
    if expanded > UNCHECKED_BYTES and expanded > MAX_RATIO * compressed:
        what = f"expands to more than {MAX_RATIO} times its size, as no text does"
        raise CorpusError(f"{name} {what}; if that is intended, unpack it and name the file")


# ---- zip archives


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive, or return the open one. Raises: CorpusError when it is damaged."""
    stat = path.stat()
    return _open_zip(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)  # an archive's directory takes long to read when it is large
def _open_zip(path: Path, mtime_ns: int, size: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (NotImplementedError, *_DAMAGE) as error:
        raise damaged_error(path, "zip", str(error)) from error


def zip_members(path: Path) -> list[Stream]:
    """Return the files in an archive, sorted by path. Raises: CorpusError when it is damaged or encrypted."""
    members = []
    for index, info in enumerate(open_zip(path).infolist()):
        if info.flag_bits & _ENCRYPTED:
            raise CorpusError(f"{path} is encrypted ({info.filename}); unpack it with its password and name the folder")
        if not info.is_dir():
            member = Stream(path, info.compress_size, info.filename, index)
            refuse_bomb(member.name, info.compress_size, info.file_size)
            members.append(member)
    return sorted(members, key=lambda member: member.inner)
