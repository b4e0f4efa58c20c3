"""What every writer into the data folder shares: whole files or nothing, one maker at a time, checksums, a bar."""

import contextlib
import hashlib
import mmap
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from charrnn.errors import CorpusError

if sys.platform != "win32":
    import fcntl

CHUNK_BYTES = 4 << 20
MARKER = ".charrnn"  # in every cache and run folder
Advance = Callable[[int], object]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes `folder`, and turns a full disk or a missing permission in the block into a CorpusError that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        remedy = "free some space, or choose another folder with --set data.cache_dir=DIR"
        raise CorpusError(f"cannot write to {folder}: {error.strerror or error}; {remedy}") from error


def expanded(path: str | Path) -> Path:
    """The path with a ~ at its beginning replaced; where there is no such user it stays, and is a name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises RuntimeError


def mark(folder: Path) -> None:
    """Marks an existing folder as a cache or run folder, which no corpus takes. Raises: OSError."""
    if not is_marked(folder):
        (folder / MARKER).write_text("A cache or run folder of charrnn: no corpus takes its files.\n", encoding="utf-8")


def is_marked(folder: Path) -> bool:
    """Whether `folder` is a cache or run folder."""
    return (folder / MARKER).exists()


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A hidden name beside `target` to make a file or folder under, removed at the end unless the block renamed it."""
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Lets one process at a time make `target`; the others wait, and should then look whether it is there.

    Where there are no file locks (Windows, some network folders) nobody waits: work may then be done twice, but
    renames and checksums still keep a half-made or mixed file from being used.
    """
    with target.with_name(f".{target.name}.lock").open("ab") as lock:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fault_of(path: Path, size: int, sha256: str) -> str:
    """What is wrong with the content of `path`, or "". size: bytes; 0 and "" mean that any will do.

    Raises: CorpusError when the file cannot be read.
    """
    with reading(path), path.open("rb") as file:
        actual_size = os.fstat(file.fileno()).st_size
        if size and actual_size != size:
            return f"size mismatch: expected {size} bytes, got {actual_size}"
        if sha256 and (actual := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            return f"checksum mismatch: expected sha256 {sha256}, got {actual}"
    return ""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read in the block into a CorpusError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error


def chunks_of(path: Path) -> Iterator[bytes]:
    """A file's bytes, a few MB at a time. Raises: CorpusError when it cannot be read."""
    with reading(path), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def files_below(root: Path, enter: Callable[[Path], bool]) -> list[Path]:
    """The files below `root`, in the order of their relative paths; folders that `enter` refuses are left out.

    Raises: CorpusError when a folder cannot be listed.
    """
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_unlisted):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if enter(here / name)]
        found += [here / name for name in names]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _refuse_unlisted(error: OSError) -> None:
    raise CorpusError(f"cannot list the folder {error.filename}: {error.strerror}; mend its permissions or move it")


@contextmanager
def byte_bar(title: str, total: int, shown: bool, done: int = 0) -> Iterator[Advance]:
    """A progress bar on stderr over `total` bytes (0 = unknown), which goes away at the end; none on a plain file.

    Yields: the function that advances it by a number of bytes.
    """
    # Here, since workers need this module and never a bar.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total or None, completed=done)
        yield lambda count: bar.advance(task, count)


def forget_pages(array: np.ndarray) -> None:
    """Gives back what reading a memory-mapped array has taken of the process's memory; the system keeps its own copy.

    Does nothing for other arrays, and where the system can't (Windows).
    """
    mapped = getattr(array, "_mmap", None)  # numpy has no public name for it
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def say(text: str, shown: bool) -> None:
    """One line on stderr for the user, when `shown`."""
    if shown:
        print(text, file=sys.stderr)
