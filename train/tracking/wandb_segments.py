"""Which steps each W&B segment of a run holds, so that together they hold every step once.

W&B keeps the latest records of an offline run in memory: a process that is killed loses them, and may also have logged
steps that the resumed run repeats. The next segment then supersedes the interrupted one: it begins with the same step,
read back from metrics.jsonl, and the old folder is renamed so that `wandb sync` skips it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUPERSEDED = "superseded-run-"
_OFFLINE = "offline-run-"


class Segments:
    """The new segment and its predecessor, which RUN/wandb_segment.json records.

    Attributes:
        first_step: The new segment holds the steps after this one.
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        """resumed_step: where the run resumes, 0 for a new run."""
        self._run_dir, self._resumed_step = run_dir, resumed_step
        self._file = run_dir / "wandb_segment.json"
        previous = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else None
        ended_at: Any = previous and previous["ended_at"]
        # Superseded: the predecessor was interrupted, or holds steps that will be repeated.
        self._superseded: str | None = None
        self.first_step = resumed_step
        if previous and (ended_at is None or (resumed_step and ended_at > resumed_step)):
            self._superseded = previous["folder"]
            self.first_step = min(previous["first_step"], resumed_step)
        elif previous and resumed_step:
            self.first_step = ended_at

    def begin(self, folder: Path) -> None:
        """Record the new segment, whose files are in `folder`, and rename a superseded predecessor."""
        if self._superseded and self._superseded.startswith(_OFFLINE):
            old = self._run_dir / "wandb" / self._superseded
            if old.is_dir():
                old.rename(old.with_name(_SUPERSEDED + old.name.removeprefix(_OFFLINE)))
        self._write(folder, None)

    def end(self, folder: Path, last_step: int) -> None:
        """Record that the segment is complete up to `last_step`."""
        self._write(folder, last_step)

    def missing_records(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl between `first_step` and the resumed step."""
        log = self._run_dir / "metrics.jsonl"
        if self.first_step >= self._resumed_step or not log.exists():
            return
        with log.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if self.first_step < record["step"] <= self._resumed_step:
                    yield {name: value for name, value in record.items() if value is not None}

    def _write(self, folder: Path, ended_at: int | None) -> None:
        fields = {"first_step": self.first_step, "folder": folder.name, "ended_at": ended_at}
        self._file.write_text(json.dumps(fields), encoding="utf-8")
