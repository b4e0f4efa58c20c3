"""What all command lines share: user errors as one line and an exit code, a stderr that may fail."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from charrnn.errors import CharRNNError, user_error


def run_command(command: Callable[[], object], *, report: bool = True) -> None:
    """Run a command line; a user error becomes one line on stderr and its exit code.

    Args:
        command: The command, which reads the process's arguments.
        report: Whether this process prints the error; of several with the same error one should.

    Raises:
        SystemExit: After a user error.
    """
    try:
        command()
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CharRNNError, OSError, MemoryError) as caught:
        error = user_error(caught)
        if report and sys.stderr is not None:  # print would take None for stdout
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


class ResilientStream:
    """A text stream whose first failed write is its last: later output is dropped, and no error is raised."""

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None if the process was started without it."""
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115, PTH123  as long as the process
        self._failed = False

    def write(self, text: str) -> int:
        """Write `text` unless an earlier write has failed. Returns its length."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush unless an earlier write has failed."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._failed:
            try:
                action()
            except (OSError, ValueError):  # ValueError: the stream is closed
                self._failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
