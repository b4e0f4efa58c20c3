"""Where figures go: metrics.jsonl, which always has them all, and the tracker a user chose.

Accelerate's tracker classes are used one by one and not through `Accelerator.init_trackers`, where one tracker's
failure ends the run. Here a tracker that fails is told of once, and training goes on without it.
"""

import html
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

_WANDB_INIT_TIMEOUT_S = 30.0


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
            rewritten.write_text("".join(kept), encoding="utf-8")
            rewritten.replace(path)
            self._file = path.open("a", encoding="utf-8")
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
        """Closes the file."""
        self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines that are whole and of no later step; a process killed while writing leaves a torn last one."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class _Backend(Protocol):
    """What a tracker must do; any of it may raise."""

    def log(self, values: dict[str, Any], step: int) -> None: ...
    def log_sample(self, text: str, step: int) -> None: ...
    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]: ...


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

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a tracker may raise anything, and none of it may end a training run
            self._backend = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
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
        "wandb": lambda: _Wandb(tracking, run_dir, config, resumed_step),
        "tensorboard": lambda: _TensorBoard(run_dir, config),
    }
    return Tracker(tracking.tracker, backends[tracking.tracker])


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._folder = run_dir / "tensorboard"
        self._tracker = TensorBoardTracker("", self._folder)
        self._tracker.start()
        self._tracker.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", 0)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._tracker.log(values, step=step)

    def log_sample(self, text: str, step: int) -> None:
        self._tracker.writer.add_text("sample", f"```text\n{text}\n```", step)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]:
        self._tracker.finish()
        return [f"tracker   tensorboard --logdir {self._folder}"]


class _Wandb:
    """A Weights & Biases run in RUN/wandb.

    Online, the run's id is kept in RUN/wandb_run.json and a resumed run goes on under it. Offline, resuming one would
    lose history, so every segment is a run of its own, and the group holds them together.
    """

    def __init__(self, tracking: TrackingConfig, run_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        import wandb

        self._wandb, self._tracking = wandb, tracking
        self._name = tracking.name or run_dir.name
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        try:
            self._start(mode, run_dir, config, resumed_step)
        except Exception as error:
            if mode != "online":
                raise
            reason = " ".join(str(error).split())[:200]
            print(f"warning: W&B cannot be reached ({reason}); logging offline instead", file=sys.stderr)
            self._start("offline", run_dir, config, resumed_step)

    def _start(self, mode: str, run_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        from accelerate.tracking import WandBTracker

        online = mode == "online"
        id_file = run_dir / "wandb_run.json"
        known = json.loads(id_file.read_text(encoding="utf-8")) if online and id_file.exists() and resumed_step else {}
        segment = self._name if online or not resumed_step else f"{self._name}-from-{resumed_step}"
        self._tracker = WandBTracker(
            self._tracking.project,
            name=segment,
            group=self._tracking.group or self._name,
            id=known.get("id"),
            resume="allow" if known else None,
            dir=str(run_dir),
            mode=mode,
            settings=self._wandb.Settings(silent=True, console="off", init_timeout=_WANDB_INIT_TIMEOUT_S),
        )
        self._tracker.start()
        self._run = self._tracker.run
        self._tracker.store_init_configuration(config)
        if online:
            id_file.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")

    def log(self, values: dict[str, Any], step: int) -> None:
        # Records of one step are merged into one row of W&B's history, whose step is the global one.
        self._tracker.log(values, step=step)

    def log_sample(self, text: str, step: int) -> None:
        self._tracker.log({"sample": self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def finish(self, summary: dict[str, Any], model_file: Path | None, step: int) -> list[str]:
        self._run.summary.update({f"best/{k}": v for k, v in summary.items()})
        if model_file and self._tracking.artifact:
            artifact = self._wandb.Artifact(f"{self._name}-model", type="model", metadata=summary)
            artifact.add_file(str(model_file))
            self._run.log_artifact(artifact, aliases=["best", f"step-{step}"])
        folder = Path(self._run.settings.sync_dir)
        url = None if self._run.offline else self._run.url
        self._tracker.finish()
        return [f"tracker   {url or f'W&B ran offline; to upload: wandb sync {_shown(folder)}'}"]


def _shown(folder: Path) -> str:
    """The folder as the user would type it from here."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)
