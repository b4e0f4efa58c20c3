"""Where figures go: metrics.jsonl, which always has them all, and the tracker a user chose.

A tracker that fails is told of once, and training goes on without it.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from charrnn.config import TrackingConfig
from charrnn.errors import CheckpointError
from train.tracking.wandb_tracker import TensorBoard, Wandb, one_line


class MetricsLog:
    """RUN/metrics.jsonl: one JSON object a line. NaN and infinities, which JSON lacks, are written as null."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keeps the whole lines of steps up to `resumed_step`; later ones will be written again.

        Raises: CheckpointError when the file can't be written.
        """
        self._path = path
        try:
            kept = _lines_up_to(path, resumed_step)
            rewritten = path.with_name(f".{path.name}.rewritten")
            with rewritten.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            rewritten.replace(path)
            # A lone surrogate has no UTF-8; its backslash form is JSON's own escape for it.
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}; choose another --run-dir") from None

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, at once. Raises: CheckpointError when the disk refuses."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free space on that disk, then run the same command again"
            ) from None

    def close(self) -> None:
        """Closes the file. Every record is on disk by then, or its writer has been told that it is not."""
        with contextlib.suppress(OSError):
            self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines that are whole and of no later step; a process killed while writing leaves a torn last one."""
    if not path.exists():
        return []
    kept = []
    # Not splitlines(), which would also cut at U+2028 and its like inside a sample.
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode("utf-8") + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class _Backend(Protocol):
    """What a tracker must do; any of it may raise."""

    def log(self, values: dict[str, Any], step: int) -> None: ...
    def log_sample(self, text: str, step: int) -> None: ...
    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]: ...
    def abandon(self) -> None: ...


class Tracker:
    """A tracker that may fail without harm: its first failure is one line on stderr, and the last thing it does."""

    def __init__(self, name: str, open_backend: Callable[[], _Backend | None]) -> None:
        self._name = name
        self._backend: _Backend | None = None
        self._backend = self._guarded(open_backend)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Figures of global step `step`."""
        if self._backend:
            self._guarded(partial(self._backend.log, values, step))

    def log_sample(self, text: str, step: int) -> None:
        """A text that the model wrote."""
        if self._backend:
            self._guarded(partial(self._backend.log_sample, text, step))

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]:
        """Ends the run, with its summary and best model file; returns lines for the user."""
        backend, self._backend = self._backend, None
        return (self._guarded(partial(backend.finish, summary, model_file, step)) if backend else None) or []

    def close(self) -> None:
        """Ends the run as failed, unless `finish` has ended it."""
        backend, self._backend = self._backend, None
        if backend:
            self._guarded(backend.abandon)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a tracker may raise anything, and none of it may end a training run
            self._backend = None
            reason = "it is not installed" if isinstance(error, ModuleNotFoundError) else one_line(error)
            print(
                f"warning: tracker {self._name} failed ({reason}); training goes on without it, and metrics.jsonl "
                "has every figure",
                file=sys.stderr,
            )
            return None


def open_tracker(tracking: TrackingConfig, run_dir: Path, config: dict[str, Any], resumed_step: int) -> Tracker:
    """The tracker that `tracking` names, told `config`; it never raises and never asks."""
    backends: dict[str, Callable[[], _Backend | None]] = {
        "none": lambda: None,
        "wandb": lambda: Wandb(tracking, run_dir, config, resumed_step),
        "tensorboard": lambda: TensorBoard(run_dir, config, resumed_step),
    }
    return Tracker(tracking.tracker, backends[tracking.tracker])
