"""Files and folders: atomic writes, file locks, checksums, errors that name the path, progress bars."""

import hashlib
import logging
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from charrnn.errors import CharRNNError, CorpusError

CHUNK_BYTES = 1 << 20
MARKER = ".charrnn"  # in every cache and run folder
LOG_WAIT_S = 30.0  # between two calls of a lock's `on_wait`

_logger = logging.getLogger(__name__)


# ---- errors


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an OSError in the block to a CorpusError that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Create `folder`, and convert an OSError in the block to a CorpusError that names it."""
    remedy = "free some space, or choose another folder with --set data.cache_dir=DIR"
    with os_errors(CorpusError, f"cannot write to {folder}", remedy):
        folder.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def os_errors(kind: type[CharRNNError], what: str, remedy: str) -> Iterator[None]:
    """Convert an OSError in the block to an error of that kind: what failed, the reason, the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}; {remedy}") from error


# ---- paths


def expand_user(path: str | Path) -> Path:
    """Replace a leading ~ by the user's home folder; the path of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises RuntimeError


def safe_name(text: str) -> str:
    """Return `text` as a name that is short and safe in file names."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:60] or "corpus"


def mark(folder: Path) -> None:
    """Mark an existing folder as a cache or run folder, which corpora exclude. Raises: OSError."""
    if not is_marked(folder):
        (folder / MARKER).write_text("A cache or run folder of charrnn; corpora exclude it.\n", encoding="utf-8")


def is_marked(folder: Path) -> bool:
    """Return whether `folder` is a cache or run folder."""
    return (folder / MARKER).exists()


def files_below(root: Path, enter: Callable[[Path], bool]) -> list[Path]:
    """Return the files below `root`, sorted by relative path.

    Args:
        root: Folder.
        enter: Whether to descend into a subfolder.

    Raises:
        CorpusError: A folder cannot be listed.
    """
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_unlisted):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if enter(here / name)]
        found += [here / name for name in names]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _refuse_unlisted(error: OSError) -> None:
    raise CorpusError(f"cannot list the folder {error.filename}: {error.strerror}; fix its permissions or exclude it")


# ---- reading and writing


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """Yield a hidden path beside `target`, to be renamed to it when complete; remove it if it is still there."""
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def lock(target: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the file lock `.NAME.lock` beside `target`; other processes wait for it.

    Without file locks (some network file systems, folders without write permission) nobody waits: work may be done
    twice, and atomic renames still keep partial files from being used.

    Args:
        target: What the lock protects; check whether it exists after acquiring.
        on_wait: Called at once and every `LOG_WAIT_S` seconds while another process holds the lock.
    """
    import filelock  # not in the base install

    held = filelock.FileLock(target.with_name(f".{target.name}.lock"), fallback_to_soft=False)
    timeout = 0.0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not held.is_locked:
            try:
                held.acquire(timeout, poll_interval=0.1)
            except filelock.Timeout:
                on_wait()
                timeout = LOG_WAIT_S
    except OSError:
        yield
        return
    try:
        yield
    finally:
        held.release()


def find_mismatch(path: Path, size: int, sha256: str) -> str:
    """Compare a file with its expected size and checksum.

    Args:
        path: File.
        size: Expected bytes; 0 = any.
        sha256: Expected hex digest; "" = any.

    Returns:
        A description of the mismatch, or "".

    Raises:
        CorpusError: The file cannot be read.
    """
    with reading(path), path.open("rb") as file:
        actual_size = os.fstat(file.fileno()).st_size
        if size and actual_size != size:
            return f"size mismatch: expected {size} bytes, got {actual_size}"
        if sha256 and (actual := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            return f"checksum mismatch: expected sha256 {sha256}, got {actual}"
    return ""


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, up to CHUNK_BYTES at a time. Raises: CorpusError."""
    with reading(path), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def release_pages(array: np.ndarray) -> None:
    """Release the resident pages of a memory-mapped array; the page cache keeps them.

    Does nothing for other arrays, and where the system lacks madvise (Windows).
    """
    mapped = getattr(array, "_mmap", None)  # numpy has no public name for it
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


# ---- progress


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Show a transient progress bar on stderr, when that is a terminal and messages at INFO level are shown.

    Args:
        title: Label.
        total: Bytes; 0 = unknown.
        done: Bytes at the start.

    Yields:
        A function that advances the bar by a number of bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = not (_logger.isEnabledFor(logging.INFO) and console.is_terminal)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total or None, completed=done)
        yield lambda count: bar.advance(task, count)
