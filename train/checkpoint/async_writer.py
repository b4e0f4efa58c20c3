"""Asynchronous checkpoint writing: a snapshot on the main thread, the write on another, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from charrnn.errors import CharRNNError
from train.checkpoint import format as checkpoints
from train.checkpoint.format import Checkpoint


class AsyncWriter:
    """Writes a run's checkpoints in the background. At most one write is in flight: the next waits for it."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """keep: step checkpoints to retain."""
        self._run_dir, self._keep = run_dir, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, *, best: bool, step: bool) -> None:
        """Take a snapshot and return; it is written as best/, as a step checkpoint, or both.

        Raises:
            CheckpointError: If the previous write failed.
        """
        self.wait()
        copy = checkpoints.snapshot(checkpoint)
        self._pending = self._pool.submit(self._write, copy, best, step)

    def error(self) -> CharRNNError | None:
        """The error of the pending write, without waiting for it. Any other exception is raised as it is."""
        if self._pending is None or not self._pending.done():
            return None
        error = self._pending.exception()
        if error is None or isinstance(error, CharRNNError):
            return error
        raise error

    def wait(self) -> None:
        """Wait until the pending write is on disk. Raises a CheckpointError if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, checkpoint: Checkpoint, best: bool, step: bool) -> None:
        # A run with best/ alone could not be resumed: its first step checkpoint is written before it.
        first = best and step and not checkpoints.step_folders(self._run_dir)
        if first:
            checkpoints.save_step(self._run_dir, checkpoint, self._keep)
        if best:
            checkpoints.save_best(self._run_dir, checkpoint)
        if step and not first:
            checkpoints.save_step(self._run_dir, checkpoint, self._keep)
