"""Weights & Biases, through Accelerate's tracker class. Offline, a run is a group of segments; see wandb_segments."""

import html
import json
import logging
import os
import re
import shlex
from pathlib import Path
from typing import Any

import wandb
from accelerate.tracking import WandBTracker as AccelerateTracker

from charrnn.config import TrackingConfig
from train.tracking.wandb_segments import Segments

logger = logging.getLogger(__name__)

# Seconds to reach W&B's server, and to upload the rest at the end; W&B's own defaults are 90 s and no limit.
_TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 600.0}


class WandbTracker:
    """A run in RUN/wandb; see train.tracking.recorder.Tracker.

    Started by itself and not by `Accelerator.init_trackers`, where one tracker's failure ends the run. Online, the id
    is kept in RUN/wandb_run.json and a resumed run continues under it. Offline, resuming a run would lose history, so
    every segment is a run of its own within one group.
    """

    def __init__(self, tracking: TrackingConfig, run_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        self._tracking, self._run_dir = tracking, run_dir
        self._name = tracking.name or run_dir.resolve().name
        _require_writable(run_dir / "wandb")
        mode = _wandb_mode()
        try:
            self._start(mode, config, resumed_step)
        except (wandb.Error, TimeoutError) as error:
            if mode != "online":
                raise
            logger.warning("W&B is unreachable (%s); logging offline instead", " ".join(str(error).split())[:300])
            self._start("offline", config, resumed_step)

    def _start(self, mode: str, config: dict[str, Any], resumed_step: int) -> None:
        online = mode == "online"
        id_file = self._run_dir / "wandb_run.json"
        known = json.loads(id_file.read_text(encoding="utf-8")) if online and id_file.exists() and resumed_step else {}
        self._segments = Segments(self._run_dir, resumed_step)
        first_step = self._segments.first_step
        timeouts = {k: s for k, s in _TIMEOUTS.items() if f"WANDB_{k.upper()}" not in os.environ}
        self._tracker = AccelerateTracker(
            self._tracking.project,
            name=self._name if online or not first_step else f"{self._name}-from-{first_step}",
            group=self._tracking.group or self._name,
            id=known.get("id"),
            resume="allow" if known else None,
            dir=str(self._run_dir),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", **timeouts),
        )
        self._tracker.start()
        self._run = self._tracker.tracker
        self._tracker.store_init_configuration({**config, "resumed_step": resumed_step})
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if online:
            id_file.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")
            logger.info("tracker   %s", self._run.url)
        self._folder, self._last_step = Path(self._run.dir).parent, resumed_step
        self._segments.begin(self._folder)
        for record in self._segments.missing_records():
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record."""
        step = record["step"]
        self._last_step = max(self._last_step, step)
        # Records of one step are merged into one row of W&B's history, whose step is the global one.
        self._tracker.log({name: value for name, value in record.items() if name != "sample"}, step=step)
        if "sample" in record:
            self._tracker.log({"sample": wandb.Html(f"<pre>{html.escape(record['sample'])}</pre>")}, step=step)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> str:
        """End the run, with the model file as an artifact if configured."""
        self._run.summary.update({f"best/{k}": v for k, v in summary.items()})
        if model_file and self._tracking.artifact:
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self._name)[:100]  # what W&B allows
            artifact = wandb.Artifact(f"{name}-model", type="model", metadata=summary)
            artifact.add_file(str(model_file))
            self._run.log_artifact(artifact, aliases=["best", f"step-{step}"])
        offline, url = self._run.offline, self._run.url
        self._tracker.finish()
        self._segments.end(self._folder, self._last_step)
        return f"W&B ran offline; to upload: {_sync_command(self._folder)}" if offline else url or ""

    def abandon(self) -> None:
        """End the run as failed."""
        self._run.finish(exit_code=1)
        self._segments.end(self._folder, self._last_step)


def _wandb_mode() -> str:
    """The user's mode (WANDB_MODE or W&B's own settings); offline without a key, for which W&B would prompt."""
    mode: str = wandb.setup().settings.mode
    # verify=False: the key is not checked here, since that fails without a network.
    if mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False, verify=False):
        return mode
    if os.environ.get("WANDB_MODE"):
        logger.warning(
            "WANDB_MODE is %s, but no W&B key was found; run `wandb login` or set WANDB_API_KEY; "
            "logging offline instead",
            mode,
        )
    return "offline"


def _require_writable(folder: Path) -> None:
    """Raise an OSError if it is not. W&B itself would fall back to the system's temporary folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")


def _sync_command(folder: Path) -> str:
    """The command that uploads this offline segment and those before it, relative to the current folder."""
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    if len(list(folder.parent.glob("offline-run-*"))) > 1:
        return f"wandb sync {shlex.quote(str(shown.parent))}/offline-run-*"
    return f"wandb sync {shlex.quote(str(shown))}"
