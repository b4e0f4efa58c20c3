"""Progress: where a run stands, and what follows from it: how far to decay, when to stop, what is best."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

from charrnn.config import RunConfig


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    step: updates made. elapsed_s: seconds of training and evaluation, over all segments. best_loss: nats/char, None
    before the first evaluation. evaluated_step: the newest step that was evaluated, -1 when none was.
    """

    step: int = 0
    elapsed_s: float = 0.0
    best_loss: float | None = None
    best_step: int = -1
    evaluations_since_best: int = 0
    evaluated_step: int = -1

    def decay(self, config: RunConfig, total_steps: int, step_s: float) -> float:
        """The share of the learning rate's decay that lies behind, 0 to 1, by steps or by time, whichever is more.

        step_s: seconds that the next update will take. By time, what counts is where that update will end: the one
        that will use the budget up gets 1.
        """
        by_steps = by_time = 0.0
        if total_steps:
            warmup = config.optim.warmup_steps
            by_steps = (self.step - warmup) / max(1, total_steps - warmup)
        if config.train.time_limit:
            by_time = (self.elapsed_s + step_s) / config.train.time_limit
        return min(1.0, max(by_steps, by_time, 0.0))

    def done(self, config: RunConfig, total_steps: int, *, decayed: bool) -> bool:
        """Whether a limit is reached: steps (0 = none), time, or evaluations without a better one.

        decayed: whether the latest update was made with the learning rate at its end. Time alone does not end a run
        whose rate has not come there, because an update or an evaluation took longer than was foreseen: one more
        update does.
        """
        if total_steps and self.step >= total_steps:
            return True
        if config.train.time_limit and decayed and self.elapsed_s >= config.train.time_limit:
            return True
        return bool(config.eval.patience) and self.evaluations_since_best >= config.eval.patience

    def evaluated(self, loss: float) -> bool:
        """Notes an evaluation of the present step; True when it is the best so far. A NaN never is."""
        self.evaluated_step = self.step
        self.evaluations_since_best += 1
        if not loss < (math.inf if self.best_loss is None else self.best_loss):
            return False
        self.best_loss, self.best_step, self.evaluations_since_best = loss, self.step, 0
        return True


class Pace:
    """How long an update takes, from the times at which updates began."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._latest: deque[float] = deque(maxlen=5)

    def update_begins(self, elapsed_s: float, *, evaluated: bool) -> None:
        """elapsed_s: the run's time now. evaluated: whether time since the update before went into an evaluation."""
        if self._began is not None and not evaluated:
            self._latest.append(elapsed_s - self._began)
        self._began = elapsed_s

    @property
    def step_s(self) -> float:
        """Seconds of an update, the median of the latest; 0 before the first is known."""
        return statistics.median(self._latest) if self._latest else 0.0
