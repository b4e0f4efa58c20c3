"""The cache of prepared corpora, and records of which files need not be read again to find theirs.

    prepared/SHA-KIND-VOCABULARY/   ids.bin and meta.json; SHA: of the text, VOCABULARY: of all else that makes the ids
    targets/KEY/                    targets.bin and meta.json, of train.loop.distill
    known/KEY.json                  for large corpora: these files, with these stamps, have that entry

An entry is written under a hidden name, synced, and renamed last, so that machines that share a disk may do the same at
the same time. A record is trusted only when every file still has its size, inode and both of its times.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from charrnn.errors import CorpusError, VocabError
from charrnn.io import Advance, lock, log, mark, reading, temporary, writing
from charrnn.vocab import Vocab

_FORMAT = 2
_STALE_S = 3600.0  # age at which a temporary folder must be a killed process's
_WRITE_S = 0.5  # between two updates of the holder's progress
_RACY_NS = 2_000_000_000  # the coarsest clock of a file system: FAT's
_MAX_SOURCES = 1000  # names of files that an entry lists

Stamp = tuple[str, int, int, int, int]


class Item(Protocol):
    """What the cache stores in a folder: one file of data, beside a meta.json."""

    @property
    def file(self) -> str:
        """The name of the file of data."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    def meta(self) -> dict[str, Any]:
        """Return what meta.json must contain, once the data are written."""
        ...

    def is_complete(self, folder: Path) -> bool:
        """Return whether `folder` has this item."""
        ...


@dataclass(frozen=True)
class Entry:
    """A prepared corpus.

    Attributes:
        sha256: Of the normalized text.
        num_ids: N.
        vocab: Its vocabulary.
        unknown: What was done with symbols missing from it.
    """

    sha256: str
    num_ids: int
    vocab: Vocab
    unknown: str = "error"
    file: ClassVar[str] = "ids.bin"

    @property
    def name(self) -> str:
        """The name of its folder."""
        rest = hashlib.sha256(json.dumps([self.vocab.to_json(), self.unknown]).encode()).hexdigest()
        return f"{self.sha256[:16]}-{self.vocab.kind}-{rest[:8]}"

    def meta(self) -> dict[str, object]:
        """Return what its meta.json must contain."""
        return {
            "format": _FORMAT,
            "sha256": self.sha256,
            "num_ids": self.num_ids,
            "dtype": self.vocab.dtype.newbyteorder("<").str,
            "vocab": self.vocab.to_json(),
            "unknown": self.unknown,
        }

    @property
    def size(self) -> int:
        """Bytes of ids.bin."""
        return self.num_ids * self.vocab.dtype.itemsize

    def is_complete(self, folder: Path) -> bool:
        """Return whether `folder` is this entry, with all of its ids."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            size = (folder / self.file).stat().st_size
        except (OSError, ValueError):
            return False
        return isinstance(meta, dict) and self.meta().items() <= meta.items() and size == self.size


def write(folder: Path, item: Item, make: Callable[[Path], None], sources: Sequence[str], progress: bool) -> None:
    """Write an item; of several processes that write the same one, the first wins.

    Args:
        folder: Where it goes.
        item: The item.
        make: Writes its file of data.
        sources: Names of the files that it was made from.
        progress: Whether to report a damaged one on stderr.

    Raises:
        CorpusError: There is no space, or the folder cannot be written.
    """
    with writing(folder.parent), temporary(folder) as hidden:
        mark(folder.parent)
        _remove_stale(folder)
        _refuse_full(folder.parent, item)
        hidden.mkdir()
        make(hidden / item.file)
        listed = {"sources": [*sources[:_MAX_SOURCES]], "num_sources": len(sources)}
        (hidden / "meta.json").write_text(json.dumps(item.meta() | listed), encoding="utf-8")
        for name in (item.file, "meta.json"):
            _sync(hidden / name)
        if folder.exists() and not item.is_complete(folder):
            log(f"{folder} was damaged and is made again", progress)
            shutil.rmtree(folder)
        try:
            hidden.rename(folder)
        except OSError:
            if not item.is_complete(folder):  # else another process was faster, with the same data
                raise


def _remove_stale(folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):  # another process may do the same
            latest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - latest > _STALE_S:
                shutil.rmtree(left)


def _refuse_full(folder: Path, item: Item) -> None:
    free = shutil.disk_usage(folder).free
    if free < item.size:
        what = f"the {Path(item.file).stem} take {item.size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        raise CorpusError(f"cannot write to {folder}: {what}; choose another folder with --set data.cache_dir=DIR")


def _sync(path: Path) -> None:
    """Flush a file to disk, so that a power loss after its rename does not leave it empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# ---- records


def stamps(files: Sequence[Path]) -> list[Stamp]:
    """Return what shows whether a file was touched: path, size, inode, mtime and ctime. Raises: CorpusError."""
    found = []
    for path in files:
        with reading(path):
            stat = path.stat()
            found.append((str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    return found


def _digest(of: list[Stamp]) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def record_path(cache_dir: Path, of: list[Stamp], options: dict[str, Any]) -> Path:
    """Return where the entry of these files, prepared with `options`, is recorded."""
    paths = [path for path, *_ in of]
    key = hashlib.sha256(json.dumps([_FORMAT, paths, options], sort_keys=True).encode()).hexdigest()
    return cache_dir / "known" / f"{key[:16]}.json"


def remember(record: Path, of: list[Stamp], began_ns: int, entry: Entry, notes: Sequence[str]) -> None:
    """Record that the files, as stamped, have that entry.

    Files written within 2 s before they were read are not recorded: another write might not change their times.

    Args:
        record: File of the record.
        of: The files' stamps.
        began_ns: Unix time at which reading them began.
        entry: Their entry.
        notes: Notes for the user.
    """
    if max(max(times) for _, _, _, *times in of) > began_ns - _RACY_NS:
        return
    fields = entry.meta() | {"stamp": _digest(of), "notes": list(notes)}
    with contextlib.suppress(OSError), temporary(record) as hidden:  # without it the next run reads the files again
        record.parent.mkdir(parents=True, exist_ok=True)
        mark(record.parent)
        hidden.write_text(json.dumps(fields), encoding="utf-8")
        hidden.replace(record)


def recall(record: Path, of: list[Stamp]) -> tuple[Entry, tuple[str, ...]] | None:
    """Return the recorded entry and its notes; None when the files must be read."""
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        if fields["stamp"] != _digest(of):
            return None
        entry = Entry(fields["sha256"], fields["num_ids"], Vocab.from_json(fields["vocab"]), fields["unknown"])
        notes = tuple(map(str, fields["notes"]))
    except (OSError, ValueError, KeyError, TypeError, VocabError):  # not there, or damaged
        return None
    return entry, notes


# ---- one process at a time


@contextmanager
def exclusive(record: Path, total: int, progress: bool) -> Iterator[Advance]:
    """Let one process of a machine prepare a corpus; the others wait, and report for whom and how far that one is.

    Args:
        record: The corpus's record, to be looked at again once the lock is held.
        total: Bytes to process.
        progress: Whether to report waiting on stderr.

    Yields:
        A function to call with the bytes processed.
    """
    holder = record.with_name(f".{record.name}.holder.json")
    with lock(record, lambda: log(_waiting_message(holder), progress)):
        try:
            yield _progress_writer(holder, total)
        finally:
            with contextlib.suppress(OSError):
                holder.unlink(missing_ok=True)


def _progress_writer(holder: Path, total: int) -> Advance:
    identity = {"process": os.getpid(), "machine": socket.gethostname(), "total": total}
    done, written = 0, -_WRITE_S

    def advance(count: int) -> None:
        nonlocal done, written
        done += count
        if time.monotonic() - written >= _WRITE_S:
            written = time.monotonic()
            with contextlib.suppress(OSError):  # only those who wait miss it
                holder.write_text(json.dumps(identity | {"done": done}), encoding="utf-8")

    advance(0)
    return advance


def _waiting_message(holder: Path) -> str:
    try:
        other = json.loads(holder.read_text(encoding="utf-8"))
        who = f"process {other['process']} on {other['machine']}"
        share = f"{other['done'] / max(1, other['total']):.0%}"
    except (OSError, ValueError, KeyError, TypeError):  # not there, or just being written
        return "waiting for another process, which is preparing the same corpus"
    return f"waiting for {who}, which is preparing the same corpus: {share} done"
