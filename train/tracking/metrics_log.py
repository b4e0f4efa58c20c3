"""RUN/metrics.jsonl, the complete local record of a run."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from charrnn.errors import CheckpointError
from charrnn.io import os_errors, temporary


class MetricsLog:
    """One JSON object a line. NaN and infinities, which JSON lacks, are written as null."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keep the complete lines of steps up to `resumed_step`; later steps will be logged again.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        self._path = path
        with (
            os_errors(CheckpointError, f"cannot write {path}", "choose another --run-dir"),
            temporary(path) as rewritten,
        ):
            with rewritten.open("wb") as file:
                file.writelines(_lines_up_to(path, resumed_step))
                file.flush()
                os.fsync(file.fileno())
            rewritten.replace(path)
            # A lone surrogate has no UTF-8; its backslash form is JSON's own escape for it.
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append and flush a record. Raises a CheckpointError if the disk refuses it."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        remedy = "free space on that disk, then rerun the same command"
        with os_errors(CheckpointError, f"cannot write {self._path}", remedy):
            self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file. Every record is on disk by then, or `write` has raised."""
        with contextlib.suppress(OSError):
            self._file.close()


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """The complete lines up to `step`; a process killed while writing leaves a truncated last line."""
    if not path.exists():
        return []
    kept = []
    # Not splitlines(), which would also split at U+2028 and its like inside a sample.
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
