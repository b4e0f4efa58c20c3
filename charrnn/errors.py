"""User errors, whose messages give the value, the limit and the remedy on one line; exit codes; text on a terminal."""

import sys

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_MAX_LENGTH = 3000  # characters of a message
# What a terminal interprets: control characters, other line ends, and marks that change the direction of writing.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {c: repr(chr(c))[1:-1] for c in _CONTROLS if chr(c) not in "\n\t"}


class CharRNNError(Exception):
    """A user error; command lines print it as one line on stderr and exit with `exit_code`."""

    exit_code = EXIT_USER_ERROR

    def __str__(self) -> str:
        """Return the message as one line of limited length, whatever characters the names in it have."""
        text = printable(super().__str__())
        return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


class ConfigError(CharRNNError):
    """A config field, file or option is unknown, of the wrong type or out of range."""


class CorpusError(CharRNNError):
    """A corpus is missing, cannot be downloaded or read, or is too small."""


class VocabError(CharRNNError):
    """A text has characters outside the vocabulary, or a vocabulary is malformed."""


class SamplingError(CharRNNError):
    """A sampling option is out of range."""


class CheckpointError(CharRNNError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(CharRNNError):
    """Training failed: it diverged, or ran out of memory."""


class RunStoppedError(CharRNNError):
    """The user stopped the run (Ctrl-C); its checkpoint is written."""

    exit_code = EXIT_INTERRUPTED


class PreemptedError(CharRNNError):
    """The run was preempted (SIGTERM, SIGUSR1, SIGHUP); its checkpoint is written, and the same command resumes it."""

    exit_code = EXIT_PREEMPTED


class ExportError(CharRNNError):
    """A checkpoint cannot be exported, or the exported file disagrees with the model."""


class ModelFileError(CharRNNError):
    """A model file is missing, damaged, not charrnn's, or of another format version."""


def user_error(error: CharRNNError | OSError | MemoryError) -> CharRNNError:
    """Convert a system error to a user error that names the file and the reason."""
    if isinstance(error, MemoryError):
        return CharRNNError(f"out of memory: {error}" if str(error) else "out of memory")
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        return CharRNNError(f"{error.filename}: {what}" if error.filename else what)
    return error


def missing_extra(error: ModuleNotFoundError, extra: str) -> BaseException:
    """Return what to raise when a package of an extra is not installed; our own programs exit with one line."""
    message = f"{error.name} is not installed; it comes with: pip install 'charrnn[{extra}]'"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name.split(".")[0] not in ("charrnn", "train"):
        return ImportError(message)
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(EXIT_USER_ERROR)


def printable(text: str) -> str:
    """Return the text as one line, with control and bidirectional characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def escape_control(text: str) -> str:
    """Escape everything in a generated text that a terminal would interpret, but line breaks and tabs."""
    return text.translate(_ESCAPES)


def listing(names: list[str], limit: int = 10) -> str:
    """Join names for a message, with the number of those beyond `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
