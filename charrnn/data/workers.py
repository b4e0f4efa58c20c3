"""Worker processes that share a job's items, and give the results back in order.

They are started as programs of their own, not by multiprocessing: its children run the caller's main module again,
which under a launcher imports torch, and in a script without the `__name__` guard starts the work anew; forked ones
would inherit torch's threads half-made. They speak over pipes, and end when their pipe does.
"""

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from charrnn.errors import CorpusError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LENGTH = struct.Struct("<Q")
_MOST = 16
_PROGRAM = "from charrnn.data.workers import serve; serve()"


class Workers:
    """`count` worker processes; with 0 the work is done here. Use as a context: at its end they are gone."""

    def __init__(self, count: int) -> None:
        """count: at most 16, beyond which whoever gives out the work can't keep up."""
        self._count = min(count, _MOST) if sys.executable else 0
        self._running: list[subprocess.Popen[bytes]] = []
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(max(1, self._count), thread_name_prefix="worker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind:  # the threads wait for answers that nobody wants any more
            for process in self._running:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._running:
            with contextlib.suppress(OSError):
                _pipe(process.stdin).close()
            process.wait()
            _pipe(process.stdout).close()

    def map(self, job: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with what `job` makes of it, in the items' order; a few are on their way at a time.

        job, items, results and errors cross by pickle. Raises: what the job raised, for the first item that failed.
        """
        if not self._count:
            yield from ((item, job(item)) for item in items)
            return
        packed = pickle.dumps(job)
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, self._threads.submit(self._ask, packed, item)))
            if len(waiting) > self._count + 1:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _ask(self, packed: bytes, item: Any) -> Any:
        """Runs in a thread of which each has a worker of its own."""
        if not hasattr(self._own, "process"):
            self._own.process, self._own.job = _started(), None
            self._running.append(self._own.process)
        process, known = self._own.process, self._own.job is packed
        try:
            _send(_pipe(process.stdin), (None if known else packed, item))
            self._own.job = packed
            done, result = _receive(_pipe(process.stdout))
        except (EOFError, OSError) as error:
            code = process.wait()
            what = f"a process that read the corpus was ended (exit code {code})"
            raise CorpusError(f"{what}; run again, with more memory if the machine is short of it") from error
        if done:
            return result
        raise result


def _started() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def serve() -> None:
    """The worker's program: answers on standard output what it is asked on standard input, until that ends."""
    # Ctrl-C reaches the whole process group; whoever gave out the work tells, and ends this process by its pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            packed, item = _receive(sys.stdin.buffer)
            try:
                job = pickle.loads(packed) if packed else job
                assert job is not None, "the first item comes with its job"
                answer = (True, job(item))
            except Exception as error:  # it goes to whoever asked
                answer = (False, error)
            _send(answers, answer)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "both were asked for"
    return pipe


def _send(pipe: IO[bytes], message: Any) -> None:
    packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(packed)))
    pipe.write(packed)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    packed = pipe.read(_LENGTH.unpack(head)[0])
    return pickle.loads(packed)
