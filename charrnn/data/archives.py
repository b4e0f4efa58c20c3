"""Zip archives: their members as sources of bytes. Nothing is unpacked to disk."""

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from charrnn import io as storage
from charrnn.data.compressed import refuse_bomb
from charrnn.errors import CorpusError
from charrnn.io import Advance, reading

_ENCRYPTED = 0x1
# What the members of documents and programs that are zips inside are called.
_CONTAINER_MEMBERS = {"[Content_Types].xml", "mimetype", "META-INF/MANIFEST.MF"}
# Above it zipfile unpacks whatever that many packed bytes hold, however much it be.
_LZMA_READ = 4096
# What zipfile, and what it unpacks with, raise for bytes that are not as they should be.
_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(IndexError, ValueError, OverflowError, RuntimeError),
)


@dataclass(frozen=True)
class Member:
    """A file in an archive. index: its place. name: its path inside. packed, size: bytes, in the archive and out."""

    archive: Path
    index: int
    name: str
    packed: int
    size: int


def is_zip(head: bytes) -> bool:
    """Whether a file that begins with `head` is a zip archive. head: 4 bytes or more, if there are as many."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def is_container(path: Path) -> bool:
    """Whether a zip archive is something else to its user: a Word, OpenDocument or EPUB file, a Java program."""
    return not _CONTAINER_MEMBERS.isdisjoint(_open(path).namelist())


def members_of(path: Path) -> list[Member]:
    """The files of an archive, in the order of their paths. Raises: CorpusError when it is damaged or encrypted."""
    members = []
    for index, info in enumerate(_open(path).infolist()):
        if info.flag_bits & _ENCRYPTED:
            raise CorpusError(f"{path} is encrypted ({info.filename}); unpack it with its password and name the folder")
        if not info.is_dir():
            refuse_bomb(f"{path}/{info.filename}", info.compress_size, info.file_size)
            members.append(Member(path, index, info.filename, info.compress_size, info.file_size))
    return sorted(members, key=lambda member: member.name)


def read_member(member: Member, advance: Advance) -> Iterator[bytes]:
    """A member's bytes, its checksum checked at the end. advance: called with its packed bytes, in proportion.

    Raises: CorpusError when it is damaged, or packed in a way that Python does not know.
    """
    name = f"{member.archive}/{member.name}"
    archive = _open(member.archive)
    given = told = 0
    with reading(member.archive):
        try:
            info = archive.infolist()[member.index]
            size = (
                storage.CHUNK_BYTES if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else _LZMA_READ
            )
            with archive.open(info) as file:
                while chunk := file.read(size):
                    given += len(chunk)
                    refuse_bomb(name, member.packed, given)
                    now = member.packed * given // max(member.size, given)
                    advance(now - told)
                    told = now
                    yield chunk
            advance(member.packed - told)
        except NotImplementedError as error:
            raise CorpusError(
                f"{name} is packed in a way that cannot be read here ({error}); unpack it first"
            ) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise _damaged(member.archive, f"{member.name}: {error}") from error  # bz2's way to say it
        except _FAULTS as error:
            raise _damaged(member.archive, f"{member.name}: {error or 'it ends in the middle'}") from error


def _open(path: Path) -> zipfile.ZipFile:
    with reading(path):
        stat = path.stat()
        return _opened(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _opened(path: Path, mtime_ns: int, size: int) -> zipfile.ZipFile:
    """The archive with its directory read, which takes long when it has many members. mtime_ns, size: its version."""
    try:
        return zipfile.ZipFile(path)
    except (NotImplementedError, *_FAULTS) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> CorpusError:
    return CorpusError(f"{path} is a damaged zip file: {reason}; bring it again, or leave it out")
