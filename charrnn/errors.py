"""The faults a user can cause. Each message says what is wrong and what to do about it, on one line."""

import sys

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_USER_FAULT = 2
EXIT_PEER_LOST = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_LONGEST = 3000  # characters of a message


class CharRNNError(Exception):
    """A fault the user can mend; command lines print it as one line on stderr and exit with `exit_code`."""

    exit_code = EXIT_USER_FAULT

    def __str__(self) -> str:
        """The message on one line of bearable length, whatever the names in it hold."""
        text = printable(super().__str__())
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class ConfigError(CharRNNError):
    """A config field, file or option is unknown, of the wrong type or out of range."""


class CorpusError(CharRNNError):
    """A corpus cannot be found, fetched, read, or is too small for what was asked."""


class VocabError(CharRNNError):
    """A text holds characters that the vocabulary lacks, or a vocabulary is malformed."""


class SamplingError(CharRNNError):
    """A sampling option is out of range."""


class CheckpointError(CharRNNError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(CharRNNError):
    """Training cannot go on: it diverged, or it ran out of memory."""


class RunStoppedError(CharRNNError):
    """The user stopped the run (Ctrl-C); its checkpoint is written."""

    exit_code = EXIT_INTERRUPTED


class PreemptedError(CharRNNError):
    """The machine is taken away (SIGTERM, SIGUSR1, SIGHUP); the checkpoint is written, and the same command goes on."""

    exit_code = EXIT_PREEMPTED


class ExportError(CharRNNError):
    """A checkpoint cannot be exported, or the exported file disagrees with the model."""


class ModelFileError(CharRNNError):
    """A model file is missing, damaged, not charrnn's, or too new."""


def user_error(error: CharRNNError | OSError | MemoryError) -> CharRNNError:
    """What the user is told of an error: of the system's, the file and the reason."""
    if isinstance(error, MemoryError):
        return CharRNNError(f"out of memory: {error}" if str(error) else "out of memory")
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        return CharRNNError(f"{error.filename}: {what}" if error.filename else what)
    return error


def missing_extra(error: ModuleNotFoundError, extra: str) -> BaseException:
    """What to raise when a library of an extra is not installed; `python -m` of ours ends with one line."""
    message = f"{error.name} is not installed; it comes with: pip install 'charrnn[{extra}]'"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name.split(".")[0] not in ("charrnn", "train"):
        return ImportError(message)
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(EXIT_USER_FAULT)


def printable(text: str) -> str:
    """The text on one line, with what moves a cursor, changes colours or turns the writing around spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listing(names: list[str], limit: int = 10) -> str:
    """Joins names for a one-line message, saying how many were left out beyond `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
