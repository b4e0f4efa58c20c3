"""Prepared corpora on disk: whole entries or none, and which files need not be read again to find theirs.

    prepared/SHA-KIND-VOCABULARY/   ids.bin and meta.json; SHA: of the text, VOCABULARY: of all else that makes the ids
    known/KEY.json                  for large corpora: these files, with these stamps, have that entry

An entry is written under a hidden name, synced, and renamed last, so that machines that share a disk may do the same at
the same time. A record is trusted only when every file still has its size, inode and both of its times.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charrnn.errors import CorpusError, VocabError
from charrnn.io import mark, reading, say, temporary, writing
from charrnn.vocab import Vocab

_FORMAT = 2
_STALE_S = 3600.0  # a temporary folder that nobody wrote into for so long is what a killed process left
_RACY_NS = 2_000_000_000  # the coarsest clock of a file system: FAT's
_MOST_SOURCES = 1000  # names of files that an entry lists

Stamp = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """A prepared corpus. num_ids: N. unknown: what became of symbols that the vocabulary lacks."""

    sha256: str
    num_ids: int
    vocab: Vocab
    unknown: str = "error"

    @property
    def name(self) -> str:
        """Its folder's name."""
        rest = hashlib.sha256(json.dumps([self.vocab.to_json(), self.unknown]).encode()).hexdigest()
        return f"{self.sha256[:16]}-{self.vocab.kind}-{rest[:8]}"

    def meta(self) -> dict[str, object]:
        """What its meta.json must say."""
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

    def is_whole(self, folder: Path) -> bool:
        """Whether `folder` is this entry, with all of its ids."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            size = (folder / "ids.bin").stat().st_size
        except (OSError, ValueError):
            return False
        return isinstance(meta, dict) and self.meta().items() <= meta.items() and size == self.size


def write(folder: Path, entry: Entry, make: Callable[[Path], None], sources: Sequence[str], progress: bool) -> None:
    """Makes the entry at `folder`; `make` writes the file of ids. Beside others that make the same, the first one wins.

    Raises: CorpusError when there is no space, or the folder can't be written.
    """
    with writing(folder.parent), temporary(folder) as hidden:
        mark(folder.parent)
        _remove_stale(folder)
        _refuse_full(folder.parent, entry.size)
        hidden.mkdir()
        make(hidden / "ids.bin")
        listed = {"sources": [*sources[:_MOST_SOURCES]], "num_sources": len(sources)}
        (hidden / "meta.json").write_text(json.dumps(entry.meta() | listed), encoding="utf-8")
        for name in ("ids.bin", "meta.json"):
            _sync(hidden / name)
        if folder.exists() and not entry.is_whole(folder):
            say(f"{folder} was damaged, so that it is made again", progress)
            shutil.rmtree(folder)
        try:
            hidden.rename(folder)
        except OSError:
            if not entry.is_whole(folder):  # else another process was faster, with the same ids
                raise


def _remove_stale(folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):  # another process may do the same
            latest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - latest > _STALE_S:
                shutil.rmtree(left)


def _refuse_full(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        what = f"the ids take {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        raise CorpusError(f"cannot write to {folder}: {what}; choose another folder with --set data.cache_dir=DIR")


def _sync(path: Path) -> None:
    """Sees to it that a renamed file is not found empty after a loss of power."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# ---- what need not be read again


def stamps(files: Sequence[Path]) -> list[Stamp]:
    """What tells a file that was not touched from one that was: path, size, inode, times of content and of inode.

    Raises: CorpusError when one can't be looked at.
    """
    found = []
    for path in files:
        with reading(path):
            stat = path.stat()
            found.append((str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    return found


def _stamp(of: list[Stamp]) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def record_path(cache_dir: Path, of: list[Stamp], options: dict[str, Any]) -> Path:
    """Where it is recorded which entry these files have when they are prepared with `options`."""
    paths = [path for path, *_ in of]
    key = hashlib.sha256(json.dumps([_FORMAT, paths, options], sort_keys=True).encode()).hexdigest()
    return cache_dir / "known" / f"{key[:16]}.json"


def remember(record: Path, of: list[Stamp], began_ns: int, entry: Entry, notes: Sequence[str]) -> None:
    """Records that the files, as stamped, have that entry.

    began_ns: when reading them began, in Unix time. Files written within 2 s of that are not recorded: they might be
    written once more without their times showing it.
    """
    if max(max(times) for _, _, _, *times in of) > began_ns - _RACY_NS:
        return
    fields = entry.meta() | {"stamp": _stamp(of), "notes": list(notes)}
    with contextlib.suppress(OSError), temporary(record) as hidden:  # without it the next run reads the files again
        record.parent.mkdir(parents=True, exist_ok=True)
        mark(record.parent)
        hidden.write_text(json.dumps(fields), encoding="utf-8")
        hidden.replace(record)


def recall(record: Path, of: list[Stamp]) -> tuple[Entry, tuple[str, ...]] | None:
    """The entry that is recorded for the files, and the notes of its making; None when they must be read."""
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        if fields["stamp"] != _stamp(of):
            return None
        entry = Entry(fields["sha256"], fields["num_ids"], Vocab.from_json(fields["vocab"]), fields["unknown"])
        notes = tuple(map(str, fields["notes"]))
    except (OSError, ValueError, KeyError, TypeError, VocabError):  # not there, or damaged
        return None
    return entry, notes
