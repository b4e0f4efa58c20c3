"""Signals that ask a run to stop. The loop reads a flag between two updates; nothing is cut off in the middle."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from charrnn.errors import EXIT_INTERRUPTED, CharRNNError, PreemptedError, RunStoppedError

# SLURM and Kubernetes send the first two before they take a machine away, a closed terminal or ssh the third; Windows
# has no SIGUSR1 and no SIGHUP.
_WATCHED = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
_SHOW_CURSOR = "\x1b[?25h"


class StopSignals:
    """The first stop signal that this process was sent.

    A thread reads them from a socket that the interpreter's own signal handler writes to. So the second Ctrl-C ends the
    process at once even while the main thread waits inside a collective, where Python runs no handler.
    """

    def __init__(self, on_stop: Callable[[], object] = lambda: None) -> None:
        """on_stop: called from a thread when the first signal comes."""
        self.received = 0
        self._interrupts = 0
        self._on_stop = on_stop

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Takes the signals while the block runs. Only the main thread can: elsewhere the block just runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        near, far = socket.socketpair()
        near.setblocking(False)
        fd_before = signal.set_wakeup_fd(near.fileno(), warn_on_full_buffer=False)
        # What is ignored from the start, as nohup does with SIGHUP, stays so.
        watched = [number for number in _WATCHED if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda *_: None) for number in watched}
        listener = threading.Thread(target=self._listen, args=(far,), name="stop signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            near.close()
            listener.join()
            far.close()

    def _listen(self, far: socket.socket) -> None:
        while numbers := far.recv(64):
            for number in numbers:
                self._note(number)

    def _note(self, number: int) -> None:
        if number not in _WATCHED:
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                stop_at_once()
        if not self.received:
            self.received = number
            self._on_stop()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                print(f"{name}: stopping once this step is done and saved{again}", file=sys.stderr, flush=True)


def stop_at_once() -> None:
    """Ends the process without another word. Checkpoints are whole or absent at any moment, so nothing is spoilt."""
    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def stop_error(number: int, line: str) -> CharRNNError:
    """The error that a run stopped by signal `number` ends with; its exit code tells a requeue what to do."""
    return RunStoppedError(line) if number == signal.SIGINT else PreemptedError(line)
