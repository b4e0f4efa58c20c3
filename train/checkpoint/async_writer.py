"""Asynchronous checkpoint writing: a snapshot on the main thread, the write on another, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from charrnn.errors import CharRNNError
from train.checkpoint import format as checkpoints
from train.checkpoint.format import Checkpoint


class CheckpointWriter:
    """Decides which checkpoints a run writes, and writes them in the background; the next write waits for the last.

    Attributes:
        run_dir: The run folder.
        best_unsaved: Whether the latest evaluation's weights are the best, and not yet written.
        saved_step: Step of the newest step checkpoint, -1 without one.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        """keep: step checkpoints to retain."""
        self.run_dir, self._keep = run_dir, keep
        self.best_unsaved, self.saved_step = False, -1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

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
        first = best and step and not checkpoints.step_folders(self.run_dir)
        if first:
            checkpoints.save_step(self.run_dir, checkpoint, self._keep)
        if best:
            checkpoints.save_for_inference(self.run_dir / checkpoints.BEST, checkpoint)
        if step and not first:
            checkpoints.save_step(self.run_dir, checkpoint, self._keep)
