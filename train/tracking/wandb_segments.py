"""Which part of a run's history each of its segments under W&B holds, so that together they hold every step once.

W&B keeps an offline run's latest records in memory: a process that is killed loses them, and may also have logged steps
that its successor makes again. The segment after such an end takes its predecessor's place: it begins with the same
step, read back from metrics.jsonl, and the predecessor's folder gets a name that `wandb sync` is not told of.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUPERSEDED = "superseded-run-"
_OFFLINE = "offline-run-"


class Segments:
    """The newest segment, as RUN/wandb_segment.json records it."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        """resumed_step: where the run goes on from."""
        self._run_dir = run_dir
        self._file = run_dir / "wandb_segment.json"
        self._resumed_step = resumed_step
        self._before = self._read()

    @property
    def first_step(self) -> int:
        """The new segment holds the steps after this one."""
        if self._before is None or (not self._resumed_step and self._before["ended_at"] is not None):
            return self._resumed_step
        if self._is_superseded():
            return min(self._before["first_step"], self._resumed_step)
        return int(self._before["ended_at"])

    def begin(self, folder: Path) -> None:
        """Records the new segment, whose files are in `folder`, and sets its predecessor's aside if it replaces it."""
        if self._before and self._is_superseded():
            old = self._run_dir / "wandb" / self._before["folder"]
            if old.is_dir() and old.name.startswith(_OFFLINE):
                old.rename(old.with_name(_SUPERSEDED + old.name.removeprefix(_OFFLINE)))
        self._write(first_step=self.first_step, folder=folder.name, ended_at=None)

    def end(self, folder: Path, last_step: int) -> None:
        """Records that the segment is closed; last_step: the last one that it holds."""
        self._write(first_step=self.first_step, folder=folder.name, ended_at=last_step)

    def missed(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl that the new segment begins with."""
        log = self._run_dir / "metrics.jsonl"
        if self.first_step >= self._resumed_step or not log.exists():
            return
        with log.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if self.first_step < record["step"] <= self._resumed_step:
                    yield {name: value for name, value in record.items() if value is not None}

    def _is_superseded(self) -> bool:
        """Whether the segment before was cut off, or holds steps that will be made again."""
        assert self._before is not None
        ended_at = self._before["ended_at"]
        if ended_at is None:
            return True
        return bool(self._resumed_step) and ended_at > self._resumed_step

    def _read(self) -> dict[str, Any] | None:
        if not self._file.exists():
            return None
        before: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        return before

    def _write(self, **fields: Any) -> None:
        self._file.write_text(json.dumps(fields), encoding="utf-8")
