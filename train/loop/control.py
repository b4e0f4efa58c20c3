"""What the ranks agree on between two steps: to go on, to stop, or to end with an error that one of them has met."""

import zlib
from collections.abc import Callable

from charrnn.errors import CharRNNError, TrainingError
from charrnn.windows import Index
from train.distributed.collectives import Collectives
from train.distributed.signals import StopSignals


class Control:
    """This rank's errors and stop signals, and those of the others.

    Attributes:
        collectives: The ranks.
        signals: Stop signals that this process receives.
        heartbeat: Called as the main thread proceeds, with a number that grows.
        stopped_by: The signal that the ranks have agreed to stop for, 0 for none.
    """

    def __init__(
        self, collectives: Collectives, signals: StopSignals, heartbeat: Callable[..., None] = lambda *_: None
    ) -> None:
        self.collectives, self.signals, self.heartbeat = collectives, signals, heartbeat
        self.stopped_by = 0
        self._error: CharRNNError | None = None

    def defer(self, action: Callable[[], object]) -> None:
        """Run what this rank alone runs; a user error waits for the next synchronisation point, where all ranks end."""
        try:
            action()
        except CharRNNError as error:
            self.note(error)

    def note(self, error: CharRNNError | None) -> None:
        """Keep an error for the next synchronisation point; the first one counts."""
        self._error = self._error or error

    def agree(self, step: int, starts: Index, elapsed_s: float) -> float:
        """Synchronise the ranks ahead of a step.

        Args:
            step: Steps made so far.
            starts: Where the global batch's windows begin, (B,).
            elapsed_s: The run's time by this rank's clock.

        Returns:
            The run's time by rank 0's clock.

        Raises:
            CharRNNError: The error that some rank has met, or that the ranks' batches differ; on every rank.
        """
        mine = pack_status(self.signals.received, self._error is not None, elapsed_s, starts)
        signals, failures, clocks, batches = zip(*self.collectives.all_gather_integers(mine), strict=True)
        if any(failures):
            self.raise_deferred()
        if ranks := [rank for rank, batch in enumerate(batches) if batch != batches[0]]:
            raise TrainingError(
                f"batch mismatch at step {step + 1}: rank(s) {', '.join(map(str, ranks))} and rank 0 would train on "
                "different windows; use the same charrnn version, config and text on every machine, then rerun the "
                "same command"
            )
        self.stopped_by = next((number for number in signals if number), 0)
        return clocks[0] / 1e6

    def raise_deferred(self) -> None:
        """Raise, on every rank, the error that any of them has met."""
        self.collectives.raise_if_any(self._error)


def pack_status(stop_signal: int, failed: bool, elapsed_s: float, starts: Index) -> tuple[int, int, int, int]:
    """Signal, failed, clock in microseconds, CRC-32 of the starts."""
    return stop_signal, int(failed), round(elapsed_s * 1e6), zlib.crc32(starts.tobytes())
