"""One run at a time in a run folder. The lock is an flock, which the kernel drops when its process dies."""

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from charrnn.errors import CheckpointError
from charrnn.io import MARKER, mark, os_errors

logger = logging.getLogger(__name__)

_LOCK, _HOLDER = ".lock", ".lock.json"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run folder inside the block. It is created, and removed again if it stays empty.

    Raises:
        CheckpointError: If another process holds it, with its id and machine, or it cannot be written.
    """
    holder = run_dir / _HOLDER
    # No soft fallback: a soft lock outlives a process that is killed.
    lock = FileLock(run_dir / _LOCK, fallback_to_soft=False)
    # An error here ends the process, and with it the lock.
    with os_errors(CheckpointError, f"cannot write to run folder {run_dir}", "choose another --run-dir"):
        missing = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        _acquire(lock, run_dir)
        mark(run_dir)
        us = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        holder.write_text(json.dumps(us), encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a failed cleanup must not hide why the block ended
            holder.unlink(missing_ok=True)
            if {p.name for p in run_dir.iterdir()} <= {_LOCK, MARKER}:
                (run_dir / MARKER).unlink(missing_ok=True)
                (run_dir / _LOCK).unlink(missing_ok=True)
                for folder in missing:
                    folder.rmdir()
        lock.release()


def _acquire(lock: FileLock, run_dir: Path) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CheckpointError(
            f"another run trains in {run_dir}{_describe(run_dir / _HOLDER)}; stop that one, or name another --run-dir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("the disk of %s has no file locks: make sure that no other run trains there", run_dir)


def _describe(holder: Path) -> str:
    """The holder of the lock, as it recorded itself."""
    try:
        them = json.loads(holder.read_text(encoding="utf-8"))
        return f" (process {them['process']} on {them['machine']}, since {them['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
