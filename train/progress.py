"""Progress: where a run stands, and what follows from it: how far to decay, when to stop, what is best."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

from charrnn.config import RunConfig


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        step: Optimizer steps made.
        elapsed_s: Seconds of training and evaluation, over all segments.
        best_loss: Lowest validation loss in nats/char, None before the first evaluation.
        best_step: Step of that evaluation, -1 before it.
        evaluations: Number of evaluations.
        evaluations_since_best: Evaluations after the best one.
        evaluated_step: Step of the latest evaluation, -1 before the first.
        evaluated_share: Share of the run that lay behind then.
        cooldown_step: Step at which early stopping began to decay the learning rate, -1 before that.
        cooldown_steps: Length of that cool-down in steps.
        cooldown_decay: Share of the decay that lay behind when it began.
    """

    step: int = 0
    elapsed_s: float = 0.0
    best_loss: float | None = None
    best_step: int = -1
    evaluations: int = 0
    evaluations_since_best: int = 0
    evaluated_step: int = -1
    evaluated_share: float = 0.0
    cooldown_step: int = -1
    cooldown_steps: int = 0
    cooldown_decay: float = 0.0

    def share(self, config: RunConfig, total_steps: int) -> float:
        """The share of the run that lies behind, by steps or by time, whichever is more: 0 to 1."""
        by_steps = self.step / total_steps if total_steps else 0.0
        by_time = self.elapsed_s / config.train.time_limit if config.train.time_limit else 0.0
        return min(1.0, max(by_steps, by_time))

    def evaluation_due(self, config: RunConfig, total_steps: int) -> bool:
        """Whether one of the `eval.times` evaluations spread over the run is due."""
        times = config.eval.times
        return int(self.share(config, total_steps) * times) > int(self.evaluated_share * times)

    def decay(self, config: RunConfig, total_steps: int, step_s: float) -> float:
        """The share of the learning rate's decay that lies behind, 0 to 1, by steps or by time, whichever is more.

        step_s: seconds that the next step will take. By time, what counts is where that step will end: the one that
        will use the budget up gets 1. During a cool-down the remaining decay is spread over its steps.
        """
        by_steps = by_time = by_cooldown = 0.0
        if total_steps:
            warmup = config.optim.warmup_steps
            by_steps = (self.step - warmup) / max(1, total_steps - warmup)
        if config.train.time_limit:
            by_time = (self.elapsed_s + step_s) / config.train.time_limit
        if self.cooldown_step >= 0:
            passed = (self.step + 1 - self.cooldown_step) / self.cooldown_steps
            by_cooldown = self.cooldown_decay + (1.0 - self.cooldown_decay) * passed
        return min(1.0, max(by_steps, by_time, by_cooldown, 0.0))

    def done(self, config: RunConfig, total_steps: int, *, decayed: bool) -> bool:
        """Whether a limit is reached: steps (0 = none), time, or the end of a cool-down.

        decayed: whether the latest step was made with the learning rate at its end. Time alone does not end a run
        whose rate has not come there, because a step or an evaluation took longer than was foreseen: one more step
        does.
        """
        if total_steps and self.step >= total_steps:
            return True
        if self.cooldown_step >= 0 and self.step >= self.cooldown_step + self.cooldown_steps:
            return True
        return bool(config.train.time_limit) and decayed and self.elapsed_s >= config.train.time_limit

    def evaluated(self, loss: float, share: float = 0.0) -> bool:
        """Records an evaluation of the present step; True when it is the best so far. A NaN never is."""
        self.evaluated_step, self.evaluated_share = self.step, share
        self.evaluations += 1
        self.evaluations_since_best += 1
        if not loss < (math.inf if self.best_loss is None else self.best_loss):
            return False
        self.best_loss, self.best_step, self.evaluations_since_best = loss, self.step, 0
        return True

    def stop_early(self, patience: int, decay: float) -> bool:
        """Begins the cool-down after `patience` evaluations without a better one; True when it begins now.

        It takes as many steps as there were since the best one. decay: share of the decay that lies behind.
        """
        if not patience or self.cooldown_step >= 0 or self.evaluations_since_best < patience:
            return False
        self.cooldown_step, self.cooldown_decay = self.step, decay
        self.cooldown_steps = max(1, self.step - max(0, self.best_step))
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
