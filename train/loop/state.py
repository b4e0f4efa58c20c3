"""What a checkpoint holds of a run besides weights, and when one is written."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from charrnn.model.rnn import State
from train.checkpoint.async_writer import AsyncWriter
from train.checkpoint.format import Checkpoint
from train.distributed.setup import device_name
from train.loop.schedule import Progress


class CheckpointWriter:
    """Decides which checkpoints a run writes; a thread writes them.

    Attributes:
        run_dir: The run folder.
        best_unsaved: Whether the latest evaluation's weights are the best, and not yet written.
        saved_step: Step of the newest step checkpoint, -1 without one.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        """keep: step checkpoints that stay."""
        self.run_dir = run_dir
        self.best_unsaved, self.saved_step = False, -1
        self._writer = AsyncWriter(run_dir, keep)
        # Of the thread's writer, for the loop: its error, and to wait for the disk.
        self.error, self.wait = self._writer.error, self._writer.wait

    def take_due(self, step: int, *, wanted: bool) -> tuple[bool, bool]:
        """What to write now, best/ and a step checkpoint; it then counts as written.

        Args:
            step: Steps made so far.
            wanted: Whether a step checkpoint is due.
        """
        best, self.best_unsaved = self.best_unsaved, False
        # The first best/ comes with a step checkpoint: without one the run could not be resumed.
        due = (wanted or (best and self.saved_step < 0)) and self.saved_step != step
        if due:
            self.saved_step = step
        return best, due

    def save(self, checkpoint: Checkpoint, *, best: bool, step: bool) -> None:
        """Take a snapshot to be written. Raises: CheckpointError when the write before this one failed."""
        self._writer.save(checkpoint, best=best, step=step)


def progress_of(saved: Checkpoint) -> Progress:
    """How far the run had come."""
    return Progress(**{name: saved.trainer[name] for name in vars(Progress())})


def metrics_of(saved: Checkpoint) -> dict[str, float]:
    """The newest value of each metric then."""
    return {name: value for name, value in saved.trainer["metrics"].items() if "/" in name}


def gather_state(accelerator: Accelerator, state: State) -> State:
    """The hidden state over the global batch, each part (L, B / world, H) -> (L, B, H); every rank calls this."""
    rows_first = (part.transpose(0, 1).contiguous() for part in state)  # (B / world, L, H)
    return tuple(accelerator.gather(part).transpose(0, 1) for part in rows_first)


def scatter_state(carried: State, rows: slice, device: torch.device) -> State:
    """This rank's rows of the hidden state, each part (L, B, H) -> (L, B / world, H)."""
    return tuple(part[:, rows].contiguous().to(device) for part in carried)


def file_metrics(accelerator: Accelerator, step: int, chars: int, elapsed_s: float) -> dict[str, Any]:
    """What a model file records of its training besides losses."""
    return {
        "step": step,
        "chars": chars,
        "time_s": round(elapsed_s, 3),
        "processes": accelerator.num_processes,
        "hardware": device_name(accelerator.device),
        "precision": accelerator.mixed_precision,
    }
