"""Recorder: one place where every figure of a run goes: metrics.jsonl, the tracker and the display."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from charrnn.config import RunConfig
from train.tracking.console import Display
from train.tracking.metrics_log import MetricsLog, Tracker, open_tracker


class Recorder:
    """Records on the main process; `Recorder.null()`, which the other ranks get, records nothing and prints nothing."""

    def __init__(self, config: RunConfig | None, log: MetricsLog | None, tracker: Tracker | None) -> None:
        self._config, self._log, self._tracker = config, log, tracker
        self._display: Display | None = None

    @classmethod
    def null(cls) -> "Recorder":
        """The recorder of a rank other than the main one."""
        return cls(None, None, None)

    @classmethod
    def open(cls, config: RunConfig, run_dir: Path, extra: dict[str, Any], resumed_step: int) -> "Recorder":
        """Goes on with RUN/metrics.jsonl after `resumed_step`, and opens the tracker, which is told `extra` as well."""
        log = MetricsLog(run_dir / "metrics.jsonl", resumed_step)
        tracker = open_tracker(config.tracking, run_dir, {**config.model_dump(mode="json"), **extra}, resumed_step)
        return cls(config, log, tracker)

    @contextlib.contextmanager
    def display(self, step: int, elapsed_s: float, total_steps: int, steps_per_epoch: int) -> Iterator[None]:
        """Shows progress while the block runs. step, elapsed_s: where it begins."""
        if self._config is None:
            yield
            return
        limit = self._config.train.time_limit
        with Display(total_steps, limit, step, steps_per_epoch, elapsed_s=elapsed_s) as self._display:
            try:
                yield
            finally:
                self._display = None

    def record(self, values: dict[str, Any]) -> None:
        """One record: `step`, `time_s`, `chars` and figures."""
        if self._tracker is None:
            return
        if self._log:
            self._log.write(values)
        step = values["step"]
        self._tracker.log({k: v for k, v in values.items() if k not in ("step", "sample")}, step)
        if "sample" in values:
            self._tracker.log_sample(values["sample"], step)
        if self._display:
            self._display.update(step, values)

    def message(self, text: str) -> None:
        """A line on stderr, above the progress bar when there is one."""
        if self._config is None:
            return
        if self._display:
            self._display.message(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def lines(self, texts: Iterable[str]) -> None:
        """Several messages."""
        for text in texts:
            self.message(text)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]:
        """Ends the tracker's run, with its summary and the model file; returns what it says to the user."""
        return self._tracker.finish(summary, model_file, step) if self._tracker else []

    def close(self) -> None:
        """Closes the log, and ends the tracker's run if `finish` did not. More than once does no harm."""
        if self._log:
            self._log.close()
        if self._tracker:
            self._tracker.close()
