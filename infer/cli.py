"""The entry of the `infer` command line: streams, exit codes, errors as one line."""

import contextlib
import errno
import io
import os
import signal
import sys

import typer

from charrnn.cli import run_command
from charrnn.errors import EXIT_INTERRUPTED, ConfigError
from infer.commands import app

# Typer exports only this leaf of its usage errors, and has moved their base between versions.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

# What a write answers on a full or broken disk, and (on Windows) on a pipe without a reader.
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF} | ({errno.EINVAL} if os.name == "nt" else set())


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; a user error becomes one line on standard error."""
    try:
        run_command(lambda: sys.exit(_call(arguments)))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _call(arguments: list[str]) -> int:
    """Run one command and return its exit code. Raises: CharRNNError, for usage errors and failed output too."""
    try:
        # Without arguments: the help, as an answer and not as an error.
        code = app(arguments or ["--help"], prog_name="infer", standalone_mode=False)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "infer"
        message = " ".join(error.format_message().split()).rstrip(".")
        raise ConfigError(f"{message}; see: {command} --help") from None
    except MemoryError:
        raise ConfigError("out of memory; generate fewer or shorter texts, or give a shorter one") from None
    except OSError as error:
        if error.errno in _OUTPUT_ERRORS and error.filename is None:
            _discard_output()
            raise ConfigError(f"cannot write to standard output: {error.strerror}") from None
        raise
    if code == EXIT_INTERRUPTED:
        typer.echo(err=True)
    return int(code or 0)


def _discard_output() -> None:
    """Drop what is still buffered: Python would try to write it again at exit, and complain."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry of the console script."""
    if hasattr(signal, "SIGPIPE"):
        # A reader that stops reading (infer ... | head) ends the process quietly, as with other programs.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # Text is UTF-8 with \n line ends, whatever the locale and the system.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
