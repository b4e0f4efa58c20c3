"""How the small programs beside the trainer run: `python -m train.export`, `python -m train.evaluate`."""

import sys
from collections.abc import Callable

import typer

from charrnn.errors import CharRNNError


def run(command: Callable[..., None]) -> None:
    """Runs a typer command on the process's arguments; a user's fault is one line on stderr, and its exit code."""
    try:
        typer.run(command)
    except CharRNNError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
