"""TensorBoard event files in RUN/tensorboard, through Accelerate's tracker class."""

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker as AccelerateTracker


class TensorBoardTracker:
    """See train.tracking.recorder.Tracker.

    Started by itself and not by `Accelerator.init_trackers`, where one tracker's failure ends the run.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        self._folder = run_dir / "tensorboard"
        # purge_step: TensorBoard then hides what the previous segment logged of later steps.
        self._tracker = AccelerateTracker("", self._folder, purge_step=resumed_step + 1 if resumed_step else None)
        self._tracker.start()
        self._log_text("config", json.dumps(config, indent=1), resumed_step)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record, and flush: a process that is killed loses what is not."""
        metrics = {name: value for name, value in record.items() if name not in ("step", "sample")}
        self._tracker.log(metrics, step=record["step"])
        if "sample" in record:
            self._log_text("sample", record["sample"], record["step"])
        self._tracker.writer.flush()

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> str:
        """End the run."""
        if summary:
            self._log_text("best", json.dumps(summary, indent=1), step)
        self._tracker.finish()
        return f"tensorboard --logdir {shlex.quote(str(self._folder))}"

    def abandon(self) -> None:
        """End the run as failed."""
        self._tracker.finish()

    def _log_text(self, key: str, text: str, step: int) -> None:
        # An indented block is the one Markdown form of verbatim text that no content can end.
        self._tracker.log({key: textwrap.indent(text, "    ", lambda line: True)}, step=step)
