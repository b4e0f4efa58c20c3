"""Log messages of this project on stderr; apart from charrnn.cli, as `infer --help` starts faster without logging."""

import logging
import sys

_PACKAGES = ("charrnn", "train", "infer")


class StderrHandler(logging.Handler):
    """Print records to stderr as it is at that moment; warnings and errors begin with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self.show(f"{record.levelname.lower()}: " * (record.levelno >= logging.WARNING) + record.getMessage())

    def show(self, text: str) -> None:
        """Print a line."""
        if sys.stderr is not None:  # print would take None for stdout
            print(text, file=sys.stderr, flush=True)


def configure_logging(level: int = logging.INFO, handler: logging.Handler | None = None) -> None:
    """Send messages of this project's packages from `level` on to `handler`, by default to stderr."""
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler or StderrHandler()]
        logger.setLevel(level)
