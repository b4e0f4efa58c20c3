"""Recorder: sends each record of a run to metrics.jsonl, the tracker and the progress display."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from charrnn.config import TrackingConfig
from train.tracking.console import Display
from train.tracking.metrics_log import MetricsLog

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A tracker's backend. Any of its methods may raise."""

    def log(self, record: dict[str, Any]) -> None:
        """Log a record: step, metrics, and perhaps a sample."""

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> str:
        """End the run successfully. Returns where to see it, or ""."""

    def abandon(self) -> None:
        """End the run as failed."""


class Recorder:
    """Records on the main process. Constructed without arguments, as on the other ranks, it records nothing.

    A tracker that raises is reported once and dropped; training continues.

    Attributes:
        display: The progress display, if one is shown.
    """

    def __init__(self, log: MetricsLog | None = None, open_tracker: Callable[[], Tracker | None] | None = None) -> None:
        self._log = log
        self.display: Display | None = None
        self._tracker: Tracker | None = self._guard(open_tracker) if open_tracker else None

    def record(self, values: dict[str, Any]) -> None:
        """Record `step`, `time_s`, `chars` and metrics. Raises a CheckpointError if the disk refuses it."""
        if self._log:
            self._log.write(values)
        if tracker := self._tracker:
            self._guard(lambda: tracker.log(values))
        if self.display:
            self.display.update(values)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> None:
        """End the tracker's run with a summary and the model file, and log where to see it."""
        tracker, self._tracker = self._tracker, None
        if tracker and (location := self._guard(lambda: tracker.finish(summary, model_file, step))):
            logger.info("tracker   %s", location)

    def close(self) -> None:
        """Close the log; unless `finish` was called, end the tracker's run as failed. May be called repeatedly."""
        if self._log:
            self._log.close()
        tracker, self._tracker = self._tracker, None
        if tracker:
            self._guard(tracker.abandon)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a tracker may raise anything, and none of it may end a training run
            self._tracker = None
            reason = one_line(error)
            if isinstance(error, ModuleNotFoundError):
                # Without TensorBoard's writer Accelerate goes on to look for another one.
                package = "tensorboard" if error.name == "tensorboardX" else error.name
                reason = f"{package} is not installed: pip install {package}"
            logger.warning("tracker failed (%s); training continues without it, metrics.jsonl is complete", reason)
            return None


def make_tracker(tracking: TrackingConfig, run_dir: Path, config: dict[str, Any], resumed_step: int) -> Tracker | None:
    """Start the tracker that `tracking` names. Nothing of a tracker is imported before it is chosen."""
    if tracking.tracker == "wandb":
        from train.tracking.wandb_tracker import WandbTracker

        return WandbTracker(tracking, run_dir, config, resumed_step)
    if tracking.tracker == "tensorboard":
        from train.tracking.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(run_dir, config, resumed_step)
    return None


def one_line(error: Exception) -> str:
    """The error's type and message on one line, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
