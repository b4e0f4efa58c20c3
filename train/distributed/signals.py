"""Stop signals. The loop reads a flag between two steps; no operation is interrupted."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from charrnn.errors import EXIT_INTERRUPTED, CharRNNError, PreemptedError, RunStoppedError

logger = logging.getLogger(__name__)

# SLURM and Kubernetes send the first two before they reclaim a machine, a closed terminal or ssh session the third;
# Windows has no SIGUSR1 and no SIGHUP.
_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
_SHOW_CURSOR = "\x1b[?25h"


class StopSignals:
    """Records the first stop signal sent to this process, in `received` (0 = none).

    A thread reads signal numbers from a socket that the interpreter's own handler writes to. So the second Ctrl-C ends
    the process at once even while the main thread waits inside a collective, where Python runs no handler.
    """

    def __init__(self, on_stop: Callable[[], object] = lambda: None) -> None:
        """on_stop: called from a thread when the first signal arrives."""
        self.received = 0
        self._interrupts = 0
        self._on_stop = on_stop

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside the block. Only the main thread can; in other threads nothing is installed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # A signal ignored from the start, as nohup does with SIGHUP, stays ignored.
        handled = [number for number in _HANDLED if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, lambda *_: None) for number in handled}
        listener = threading.Thread(target=self._listen, args=(reader,), name="stop signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            writer.close()
            listener.join()
            reader.close()

    def _listen(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                self._record(number)

    def _record(self, number: int) -> None:
        if number not in _HANDLED:
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                exit_now()
        if not self.received:
            self.received = number
            self._on_stop()
            hint = " (Ctrl-C again exits immediately)" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            logger.warning("%s received: stopping after this step and its checkpoint%s", name, hint)


def exit_now() -> None:
    """End the process immediately. Checkpoints are complete or absent at any moment, so none is damaged."""
    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def stop_error(number: int, message: str) -> CharRNNError:
    """The error that ends a run stopped by signal `number`; its exit code tells a scheduler whether to requeue."""
    return RunStoppedError(message) if number == signal.SIGINT else PreemptedError(message)
