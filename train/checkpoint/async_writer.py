"""Checkpoints on their way to the disk: a snapshot on the main thread, the writing on another, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from charrnn.errors import CharRNNError
from train.checkpoint import format as checkpoints
from train.checkpoint.format import Checkpoint


class Saver:
    """Writes a run's checkpoints in the background. At most one is in flight: the next waits for it."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """keep: step checkpoints that stay."""
        self._run_dir, self._keep = run_dir, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, *, best: bool, step: bool) -> None:
        """Takes a snapshot and returns; `best` and `step` say what it is written as.

        Raises: CheckpointError when the write before this one failed.
        """
        self.wait()
        copy = checkpoints.snapshot(checkpoint)
        self._writing = self._pool.submit(self._write, copy, best, step)

    def failure(self) -> CharRNNError | None:
        """What the write in flight has failed with, without waiting for it. A defect of ours is raised as it is."""
        if self._writing is None or not self._writing.done():
            return None
        error = self._writing.exception()
        if error is None or isinstance(error, CharRNNError):
            return error
        raise error

    def wait(self) -> None:
        """Returns once all is on disk. Raises: CheckpointError when it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, checkpoint: Checkpoint, best: bool, step: bool) -> None:
        first = best and step and not checkpoints.step_folders(self._run_dir)  # best/ alone can't be resumed
        if first:
            checkpoints.save_step(self._run_dir, checkpoint, self._keep)
        if best:
            checkpoints.save_best(self._run_dir, checkpoint)
        if step and not first:
            checkpoints.save_step(self._run_dir, checkpoint, self._keep)
