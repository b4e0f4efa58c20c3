"""One process of a machine at a time makes what others wait for; who waits sees for whom, and how far that one is."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from charrnn.io import byte_bar, say

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Tell = Callable[[int], None]

_LOOK_S = 0.2  # between two looks at the lock
_REPEAT_S = 30.0  # between two lines of one who waits, where there is no bar
_WRITE_S = 0.5  # between two notes of how far the work is


@contextmanager
def turn(target: Path, total: int, shown: bool) -> Iterator[Tell]:
    """Holds the turn of making `target` while the block runs; others of this machine wait until then.

    They should look then whether it is there. Where there are no file locks, or the folder can't be written, nobody
    waits: work is then done twice, and renames still keep what is half-made from being used. total: bytes to work
    through. shown: tell on stderr of waiting. Yields: the function to call with how many bytes were worked through.
    """
    note = target.with_name(f".{target.name}.turn.json")
    with contextlib.ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(target.with_name(f".{target.name}.lock").open("ab"))
        except OSError:
            yield lambda _: None
            return
        if not _taken(lock):
            _wait(lock, note, shown)
        held.callback(_forget, note)
        yield _teller(note, total)


def _taken(lock: IO[bytes]) -> bool:
    """Whether the lock is ours now, or the disk has none. It is given back when the file is closed."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _wait(lock: IO[bytes], note: Path, shown: bool) -> None:
    said = -_REPEAT_S
    their = _read(note)
    with byte_bar("waiting for another process", int(their.get("total", 0)), shown) as advance:
        done = 0
        while not _taken(lock):
            their = _read(note)
            now = int(their.get("done", 0))
            advance(max(0, now - done))
            done = max(now, done)
            if time.monotonic() - said >= _REPEAT_S:
                said = time.monotonic()
                say(_waiting_line(their), shown)
            time.sleep(_LOOK_S)


def _waiting_line(their: dict[str, Any]) -> str:
    if not their:
        return "waiting for another process, which prepares the same corpus"
    far = f"{their['done'] / their['total']:.0%}" if their["total"] else f"{their['done']} bytes"
    return f"waiting for process {their['process']} on {their['machine']}, which prepares the same corpus: {far}"


def _teller(note: Path, total: int) -> Tell:
    us = {"process": os.getpid(), "machine": socket.gethostname(), "total": total}
    done, written = 0, -_WRITE_S

    def tell(count: int) -> None:
        nonlocal done, written
        done += count
        if time.monotonic() - written >= _WRITE_S:
            written = time.monotonic()
            with contextlib.suppress(OSError):  # a note that can't be written is only missed by those who wait
                note.write_text(json.dumps(us | {"done": done}), encoding="utf-8")

    tell(0)
    return tell


def _forget(note: Path) -> None:
    with contextlib.suppress(OSError):
        note.unlink(missing_ok=True)


def _read(note: Path) -> dict[str, Any]:
    try:
        their = json.loads(note.read_text(encoding="utf-8"))
        return {name: their[name] for name in ("process", "machine", "total", "done")}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or just being written
        return {}
