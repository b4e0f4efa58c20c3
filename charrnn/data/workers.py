"""A pool of worker processes that process items in parallel and return the results in order.

Not multiprocessing or concurrent.futures: spawned children re-import the caller's main module, which under a launcher
imports torch, and forked ones inherit torch's threads. Not loky, which avoids both: its workers start 0.9 s later
(2 cores, 2026-11-26), a quarter of the time that 1 GB takes to prepare.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from charrnn.errors import CorpusError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_WORKERS = 16  # more than the parent process can feed
_PROGRAM = "from charrnn.data.workers import serve; serve()"


class Workers:
    """`count` worker processes, started on demand; with 0 the caller does the work. A context manager."""

    def __init__(self, count: int) -> None:
        self._count = min(count, _MAX_WORKERS) if sys.executable else 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._local = threading.local()  # of each thread: its process, and the job that the process has
        self._threads = ThreadPoolExecutor(max(1, self._count), thread_name_prefix="worker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:  # threads may be blocked on answers that nobody needs any more
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.communicate()

    def map(self, job: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Apply `job` to each item; job, items, results and errors are pickled.

        At most `count` + 2 items are in flight, so that memory stays bounded.

        Yields:
            Each item with its result, in order.

        Raises:
            Exception: What the job raised, for the first item that failed.
            CorpusError: A worker process was killed.
        """
        if not self._count:
            yield from ((item, job(item)) for item in items)
            return
        pickled = pickle.dumps(job)
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, self._threads.submit(self._call, pickled, item)))
            if len(waiting) > self._count + 1:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _call(self, job: bytes, item: Any) -> Any:
        """Run in a thread, each of which has its own worker process."""
        local = self._local
        if not hasattr(local, "process"):
            local.process, local.job = _start(), None
            self._processes.append(local.process)
        try:
            _send(local.process.stdin, (None if local.job is job else job, item))
            local.job = job
            succeeded, result = pickle.load(local.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            what = f"a worker process was killed (exit code {local.process.wait()})"
            raise CorpusError(f"{what}; run again, with more memory if the machine is short of it") from error
        if succeeded:
            return result
        raise result


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def serve() -> None:
    """Answer requests on stdin until it is closed; the worker's program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stray prints of the job go to stderr
    job: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pickled, item = pickle.load(sys.stdin.buffer)
            try:
                job = pickle.loads(pickled) if pickled else job
                assert job is not None, "the first item comes with its job"
                answer = (True, job(item))
            except Exception as error:  # raised again in the parent
                answer = (False, error)
            _send(answers, answer)


def _send(pipe: Any, message: Any) -> None:
    pickle.dump(message, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()
