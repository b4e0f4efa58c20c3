"""The cache of prepared corpora, and records of which files need not be read again to find theirs.

    prepared/SHA-KIND-VOCABULARY/   ids.bin and meta.json; SHA: of the text, VOCABULARY: of all else that makes the ids
    targets/KEY/                    targets.bin and meta.json, of train.loop.distill
    known/KEY.json                  the entry of files with these stamps, prepared with these options

An entry is written under a hidden name, synced, and renamed last, so that machines that share a disk may do the same at
the same time. A record is trusted only when every file still has its size, inode and both of its times.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from charrnn.errors import VocabError
from charrnn.io import mark, reading, temporary, writing
from charrnn.vocab import Vocab

_FORMAT = 2
_STALE_S = 3600.0  # age at which a temporary folder must be a killed process's
_RACY_NS = 2_000_000_000  # the coarsest clock of a file system: FAT's

Stamp = tuple[str, int, int, int, int]

_logger = logging.getLogger(__name__)


class Item(Protocol):
    """What the cache stores in a folder: one file of data, beside a meta.json."""

    @property
    def file(self) -> str:
        """The name of the file of data."""
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

    def is_complete(self, folder: Path) -> bool:
        """Return whether `folder` is this entry, with all of its ids."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            size = (folder / self.file).stat().st_size
        except (OSError, ValueError):
            return False
        return (
            isinstance(meta, dict)
            and self.meta().items() <= meta.items()
            and size == self.num_ids * self.vocab.dtype.itemsize
        )


def write(folder: Path, item: Item, make: Callable[[Path], None]) -> None:
    """Write an item; of several processes that write the same one, the first wins.

    Args:
        folder: Where it goes.
        item: The item.
        make: Writes its file of data.

    Raises:
        CorpusError: There is no space, or the folder cannot be written.
    """
    with writing(folder.parent), temporary(folder) as hidden:
        mark(folder.parent)
        _remove_stale(folder)
        hidden.mkdir()
        make(hidden / item.file)
        (hidden / "meta.json").write_text(json.dumps(item.meta()), encoding="utf-8")
        for name in (item.file, "meta.json"):
            _sync(hidden / name)
        if folder.exists() and not item.is_complete(folder):
            _logger.info(f"{folder} was damaged and is made again")
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


def record_path(cache_dir: Path, of: list[Stamp], options: dict[str, Any]) -> Path:
    """Return where the entry of files with these stamps, prepared with `options`, is recorded."""
    key = hashlib.sha256(json.dumps([_FORMAT, of, options], sort_keys=True).encode()).hexdigest()
    return cache_dir / "known" / f"{key[:16]}.json"


def remember(record: Path, of: list[Stamp], began_ns: int, entry: Entry, notes: Sequence[str]) -> None:
    """Record the entry of files.

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
    with contextlib.suppress(OSError), temporary(record) as hidden:  # without it the next run reads the files again
        record.parent.mkdir(parents=True, exist_ok=True)
        mark(record.parent)
        hidden.write_text(json.dumps(entry.meta() | {"notes": list(notes)}), encoding="utf-8")
        hidden.replace(record)


def recall(record: Path) -> tuple[Entry, tuple[str, ...]] | None:
    """Return the recorded entry and its notes; None when the files must be read."""
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        entry = Entry(fields["sha256"], fields["num_ids"], Vocab.from_json(fields["vocab"]), fields["unknown"])
        return entry, tuple(map(str, fields["notes"]))
    except (OSError, ValueError, KeyError, TypeError, VocabError):  # not there, or damaged
        return None
