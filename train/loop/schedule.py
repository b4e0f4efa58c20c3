"""Progress: where a run stands, and what follows from it: how far to decay, when to stop, what is best."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from charrnn.config import RunConfig, seconds
from train.loop.dataloader import total_steps
from train.loop.optimizer import lr_at, lr_factor


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
        evaluated_share: Completed fraction of the run then.
        cooldown_step: Step at which early stopping began to decay the learning rate, -1 before that.
        cooldown_steps: Length of that cool-down in steps.
        cooldown_decay: Completed fraction of the decay when it began.
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
        """Completed fraction of the run, 0 to 1, by steps or by time, whichever is more."""
        by_steps = self.step / total_steps if total_steps else 0.0
        by_time = self.elapsed_s / config.train.time_limit if config.train.time_limit else 0.0
        return min(1.0, max(by_steps, by_time))

    def evaluation_due(self, config: RunConfig, total_steps: int) -> bool:
        """Whether one of the `eval.times` evaluations spread over the run is due."""
        times = config.eval.times
        return int(self.share(config, total_steps) * times) > int(self.evaluated_share * times)

    def decay(self, config: RunConfig, total_steps: int, step_s: float) -> float:
        """Completed fraction of the learning rate's decay, 0 to 1, by steps or by time, whichever is more.

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

        It takes as many steps as there were since the best one. decay: completed fraction of the decay.
        """
        if not patience or self.cooldown_step >= 0 or self.evaluations_since_best < patience:
            return False
        self.cooldown_step, self.cooldown_decay = self.step, decay
        self.cooldown_steps = max(1, self.step - max(0, self.best_step))
        return True


class Pace:
    """How long a step takes, from the times at which steps began."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._latest: deque[float] = deque(maxlen=5)

    def step_begins(self, elapsed_s: float, *, evaluated: bool) -> None:
        """elapsed_s: the run's time now. evaluated: whether an evaluation took place since the previous step."""
        if self._began is not None and not evaluated:
            self._latest.append(elapsed_s - self._began)
        self._began = elapsed_s

    @property
    def step_s(self) -> float:
        """Seconds of a step, the median of the latest; 0 before the first is known."""
        return statistics.median(self._latest) if self._latest else 0.0


class Schedule:
    """A run's clock, limits and learning rate: when what is due.

    Attributes:
        progress: Where the run stands.
        total_steps: Steps of the complete run; 0 when only time limits it.
    """

    def __init__(self, config: RunConfig, steps_per_epoch: int, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.progress, self.total_steps = Progress(), total_steps(config, steps_per_epoch)
        self._config, self._clock, self._pace = config, clock, Pace()
        self._decay = 1.0
        self.start()

    def start(self) -> None:
        """Start this segment's clock, which continues that of earlier ones."""
        self._started, self._earlier_s = self._clock(), self.progress.elapsed_s
        self._logged_s = self._saved_s = self._earlier_s

    def now(self) -> float:
        """Seconds of training and evaluation, over all segments, by this process's clock."""
        return self._earlier_s + self._clock() - self._started

    def begin_step(self, elapsed_s: float) -> None:
        """elapsed_s: the run's time now, by rank 0's clock."""
        progress = self.progress
        progress.elapsed_s = elapsed_s
        self._pace.step_begins(elapsed_s, evaluated=progress.evaluated_step == progress.step)

    def next_lr(self) -> float:
        """The learning rate of the next step."""
        self._decay = self.progress.decay(self._config, self.total_steps, self._pace.step_s)
        return lr_at(self.progress.step, self._config.optim, self._decay) * lr_factor(self._config)

    def done(self) -> bool:
        """Whether the run has reached its end."""
        return self.progress.done(self._config, self.total_steps, decayed=self._decay >= 1)

    def remaining_s(self, chars_per_s: float) -> float:
        """Seconds to the nearer limit at that speed; infinite without one."""
        left = math.inf
        if self.total_steps:
            chars = self._config.data.batch_size * self._config.data.seq_len
            left = (self.total_steps - self.progress.step) * chars / chars_per_s
        limit = self._config.train.time_limit
        return min(left, limit - self.progress.elapsed_s) if limit else left

    def log_due(self) -> bool:
        """Whether a record of the training metrics is due."""
        due = self._is_due(self._config.log.every, self._logged_s)
        if due:
            self._logged_s = self.progress.elapsed_s
        return due

    def checkpoint_due(self) -> bool:
        """Whether a step checkpoint is due; the one of the run's end comes after the last evaluation."""
        due = self._is_due(self._config.checkpoint.every, self._saved_s) and not self.done()
        if due:
            self._saved_s = self.progress.elapsed_s
        return due

    def evaluation_due(self) -> bool:
        """Whether an evaluation is due, by its steps or its share of the run."""
        every = self._is_due(self._config.eval.every, 0.0)
        return every or self.progress.evaluation_due(self._config, self.total_steps)

    def noise_scale_due(self) -> bool:
        """Whether the next step's gradient is to be compared with that of fewer windows."""
        every = self._config.train.noise_scale_every
        return bool(every) and (self.progress.step + 1) % every == 0

    def evaluation_missing(self) -> bool:
        """Whether the step that the run resumes from has yet to be evaluated: a stop cut that off, or best/ is lost."""
        progress = self.progress
        lost = progress.evaluations > 0 and progress.best_step < 0
        return lost or (progress.step > 0 and self._is_due(self._config.eval.every, 0.0))

    def sample_due(self) -> bool:
        """Whether the evaluation that comes next writes a sample: every `sample.every`-th does, and the last."""
        config = self._config.sample
        return bool(config.length) and (self.done() or (self.progress.evaluations + 1) % config.every == 0)

    def evaluated(self, loss: float) -> bool:
        """Note an evaluation's loss; True when it is the best so far."""
        return self.progress.evaluated(loss, self.progress.share(self._config, self.total_steps))

    def stop_early(self) -> bool:
        """Begin the cool-down if `eval.patience` is used up; True when it begins now."""
        return self.progress.stop_early(self._config.eval.patience, self._decay)

    def _is_due(self, every: int | str, last_s: float) -> bool:
        """every: steps, or a duration as text. last_s: the run's time when it was due last."""
        if isinstance(every, str):
            return self.progress.elapsed_s - last_s >= seconds(every)
        return bool(every) and self.progress.step % every == 0
