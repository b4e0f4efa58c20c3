"""How the programs of train/ run: user errors as one line on stderr, and a stderr whose failure ends nothing."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import typer

from charrnn.errors import CharRNNError, user_error


def run(command: Callable[..., None]) -> None:
    """Runs a typer command on the process's arguments; a user's fault is one line on stderr, and its exit code."""
    try:
        typer.run(command)
    except (CharRNNError, OSError, MemoryError) as error:
        fault = user_error(error)
        typer.echo(f"error: {fault}", err=True)
        sys.exit(fault.exit_code)


class LastingStream:
    """A text stream of which the first write that fails is the last: what comes after it is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None where the process was started without it."""
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115, PTH123  as long as the process
        self._failed = False

    def write(self, text: str) -> int:
        """Writes what the stream takes, and says that it took all."""
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes a stream that has not failed."""
        self._tried(self._stream.flush)

    def _tried(self, action: Callable[[], object]) -> None:
        if not self._failed:
            try:
                action()
            except (OSError, ValueError):  # ValueError: it was closed
                self._failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
