"""The trackers: Weights & Biases and TensorBoard, through Accelerate's tracker classes.

Each class is started by itself and not by `Accelerator.init_trackers`, where one tracker's failure ends the run.
Nothing of a tracker is imported before it is chosen.
"""

import html
import json
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from charrnn.config import TrackingConfig
from train.tracking.wandb_segments import Segments

# Seconds to reach W&B's server, and to upload the rest at the end; by itself W&B waits 90 s and for ever.
_WANDB_TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 600.0}


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._folder = run_dir / "tensorboard"
        # purge_step: TensorBoard then leaves out what the segment before logged of later steps.
        self._tracker = TensorBoardTracker("", self._folder, purge_step=resumed_step + 1 if resumed_step else None)
        self._tracker.start()
        self._log_text("config", json.dumps(config, indent=1), resumed_step)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Figures of global step `step`."""
        self._tracker.log(values, step=step)
        self._tracker.writer.flush()  # a process that is killed loses what is not

    def log_sample(self, text: str, step: int) -> None:
        """A text that the model wrote."""
        self._log_text("sample", text, step)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]:
        """Ends the run; returns lines for the user."""
        if summary:
            self._log_text("best", json.dumps(summary, indent=1), step)
        self._tracker.finish()
        return [f"tracker   tensorboard --logdir {shlex.quote(str(self._folder))}"]

    def abandon(self) -> None:
        """Ends the run as failed."""
        self._tracker.finish()

    def _log_text(self, key: str, text: str, step: int) -> None:
        # An indented block is Markdown's one form of verbatim text that no content can end.
        self._tracker.log({key: textwrap.indent(text, "    ", lambda line: True)}, step=step)


class Wandb:
    """A Weights & Biases run in RUN/wandb.

    Online, the run's id is kept in RUN/wandb_run.json and a resumed run goes on under it. Offline, resuming one would
    lose history, so every segment is a run of its own, and the group holds them together (see wandb_segments).
    """

    def __init__(self, tracking: TrackingConfig, run_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        import wandb

        self._wandb, self._tracking, self._run_dir = wandb, tracking, run_dir
        self._name = tracking.name or run_dir.resolve().name
        _require_writable(run_dir / "wandb")
        mode = _wandb_mode(wandb)
        try:
            self._start(mode, config, resumed_step)
        except (wandb.Error, TimeoutError) as error:
            if mode != "online":
                raise
            _warn_offline(f"W&B cannot be reached ({one_line(error)})")
            self._start("offline", config, resumed_step)

    def _start(self, mode: str, config: dict[str, Any], resumed_step: int) -> None:
        from accelerate.tracking import WandBTracker

        online = mode == "online"
        id_file = self._run_dir / "wandb_run.json"
        known = json.loads(id_file.read_text(encoding="utf-8")) if online and id_file.exists() and resumed_step else {}
        segments = Segments(self._run_dir, resumed_step)
        timeouts = {k: s for k, s in _WANDB_TIMEOUTS.items() if f"WANDB_{k.upper()}" not in os.environ}
        first_step = segments.first_step
        segment = self._name if online or not first_step else f"{self._name}-from-{first_step}"
        self._tracker = WandBTracker(
            self._tracking.project,
            name=segment,
            group=self._tracking.group or self._name,
            id=known.get("id"),
            resume="allow" if known else None,
            dir=str(self._run_dir),
            mode=mode,
            settings=self._wandb.Settings(silent=True, console="off", **timeouts),
        )
        self._tracker.start()
        self._run = self._tracker.tracker
        self._tracker.store_init_configuration({**config, "resumed_step": resumed_step})
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if online:
            id_file.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")
            print(f"tracker   {self._run.url}", file=sys.stderr)
        self._segments, self._last_step = segments, resumed_step
        self._folder = Path(self._run.dir).parent
        segments.begin(self._folder)
        for record in segments.missed():
            self.log({k: v for k, v in record.items() if k not in ("step", "sample")}, record["step"])
            if "sample" in record:
                self.log_sample(record["sample"], record["step"])

    def log(self, values: dict[str, Any], step: int) -> None:
        """Figures of global step `step`."""
        self._last_step = max(self._last_step, step)
        # Records of one step are merged into one row of W&B's history, whose step is the global one.
        self._tracker.log({"step": step, **values}, step=step)

    def log_sample(self, text: str, step: int) -> None:
        """A text that the model wrote."""
        self._tracker.log({"sample": self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]:
        """Ends the run; returns lines for the user."""
        self._run.summary.update({f"best/{k}": v for k, v in summary.items()})
        if model_file and self._tracking.artifact:
            # What W&B allows in an artifact's name.
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self._name)[:100]
            artifact = self._wandb.Artifact(f"{name}-model", type="model", metadata=summary)
            artifact.add_file(str(model_file))
            self._run.log_artifact(artifact, aliases=["best", f"step-{step}"])
        if self._run.offline:
            lines = [f"tracker   W&B ran offline; to upload: {_sync_command(self._folder)}"]
        else:
            lines = [f"tracker   {self._run.url}"] if self._run.url else []
        self._tracker.finish()
        self._segments.end(self._folder, self._last_step)
        return lines

    def abandon(self) -> None:
        """Ends the run as failed."""
        self._run.finish(exit_code=1)
        self._segments.end(self._folder, self._last_step)


def _wandb_mode(wandb: Any) -> str:
    """The user's mode (WANDB_MODE, or W&B's own settings); offline without a key, which W&B would stop and ask for."""
    mode: str = wandb.setup().settings.mode
    # verify=False: the key is not tried out here, since that fails where there is no network.
    if mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False, verify=False):
        return mode
    if os.environ.get("WANDB_MODE"):
        _warn_offline(f"WANDB_MODE is {mode}, but there is no W&B key; run `wandb login` or set WANDB_API_KEY")
    return "offline"


def _warn_offline(reason: str) -> None:
    print(f"warning: {reason}; logging offline instead", file=sys.stderr)


def _require_writable(folder: Path) -> None:
    """Raises: OSError. W&B itself would go to the system's temporary folder instead."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")


def _sync_command(folder: Path) -> str:
    """What uploads this offline segment and those before it, as the user would type it from here."""
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    if len(list(folder.parent.glob("offline-run-*"))) > 1:
        return f"wandb sync {shlex.quote(str(shown.parent))}/offline-run-*"
    return f"wandb sync {shlex.quote(str(shown))}"


def one_line(error: Exception) -> str:
    """The error's kind and message, without line breaks and of bearable length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
