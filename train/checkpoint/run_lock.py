"""One run at a time in a run folder. The system drops a dead process's lock, so a stale one is no obstacle."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from charrnn.errors import CheckpointError
from charrnn.io import MARKER, mark

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCK, _HOLDER = ".lock", ".lock.json"


@contextlib.contextmanager
def only_run_in(run_dir: Path) -> Iterator[None]:
    """Holds the run folder while the block runs. Makes it, and takes it away again if it stays empty.

    Raises: CheckpointError when another process holds it, named with its machine, or when it can't be written.
    """
    holder = run_dir / _HOLDER
    with contextlib.ExitStack() as held:
        try:
            missing = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
            run_dir.mkdir(parents=True, exist_ok=True)
            _take(held.enter_context((run_dir / _LOCK).open("ab")), run_dir)
            mark(run_dir)
            us = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            holder.write_text(json.dumps(us), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"cannot write to run folder {run_dir}: {error.strerror}; choose another --run-dir"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # tidying up must not hide why the block ended
                holder.unlink(missing_ok=True)
                if {p.name for p in run_dir.iterdir()} <= {_LOCK, MARKER}:
                    (run_dir / MARKER).unlink(missing_ok=True)
                    (run_dir / _LOCK).unlink()
                    for folder in missing:
                        folder.rmdir()


def _take(file: IO[bytes], run_dir: Path) -> None:
    """Locks the open file until it is closed. Raises: CheckpointError when another process has it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise CheckpointError(
            f"another run trains in {run_dir}{_told(run_dir / _HOLDER)}; stop that one, or name another --run-dir"
        ) from None
    except OSError:
        print(f"warning: the disk of {run_dir} has no file locks: see that no other run trains there", file=sys.stderr)


def _told(holder: Path) -> str:
    """Who holds the lock, as it wrote itself down."""
    try:
        them = json.loads(holder.read_text(encoding="utf-8"))
        return f" (process {them['process']} on {them['machine']}, since {them['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
