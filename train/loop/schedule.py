"""Where a run stands, and what follows from it: the learning rate, what is due, when to stop, what is best."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from charrnn.config import RunConfig, seconds
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

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Progress":
        """That of a checkpoint's record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


class Schedule:
    """A run's clock, limits and learning rate: when what is due.

    Attributes:
        progress: Where the run stands.
        total_steps: Steps of the complete run; 0 when only time limits it.
    """

    def __init__(self, config: RunConfig, steps_per_epoch: int, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        by_epochs = max(1, math.ceil(config.train.epochs * steps_per_epoch)) if config.train.epochs else 0
        self.progress = Progress()
        self.total_steps = min((n for n in (by_epochs, config.train.max_steps) if n), default=0)
        self._config, self._clock = config, clock
        self._limit_s = config.train.time_limit
        self._step_began: float | None = None
        self._step_times: deque[float] = deque(maxlen=5)
        self._decay = 1.0  # of the latest step
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
        # A step that an evaluation followed took less than the time until now.
        if self._step_began is not None and progress.evaluated_step != progress.step:
            self._step_times.append(elapsed_s - self._step_began)
        self._step_began = elapsed_s

    def next_lr(self) -> float:
        """The learning rate of the next step."""
        self._decay = self.decay(statistics.median(self._step_times) if self._step_times else 0.0)
        return lr_at(self.progress.step, self._config.optim, self._decay) * lr_factor(self._config)

    def decay(self, step_s: float) -> float:
        """Completed fraction of the learning rate's decay, 0 to 1, by steps or by time, whichever is more.

        step_s: seconds that the next step will take. By time, what counts is where that step will end: the one that
        will use the budget up gets 1. During a cool-down the remaining decay is spread over its steps.
        """
        progress = self.progress
        by_steps = by_time = by_cooldown = 0.0
        if self.total_steps:
            warmup = self._config.optim.warmup_steps
            by_steps = (progress.step - warmup) / max(1, self.total_steps - warmup)
        if self._limit_s:
            by_time = (progress.elapsed_s + step_s) / self._limit_s
        if progress.cooldown_step >= 0:
            passed = (progress.step + 1 - progress.cooldown_step) / progress.cooldown_steps
            by_cooldown = progress.cooldown_decay + (1.0 - progress.cooldown_decay) * passed
        return min(1.0, max(by_steps, by_time, by_cooldown, 0.0))

    def share(self) -> float:
        """Completed fraction of the run, 0 to 1, by steps or by time, whichever is more."""
        by_steps = self.progress.step / self.total_steps if self.total_steps else 0.0
        by_time = self.progress.elapsed_s / self._limit_s if self._limit_s else 0.0
        return min(1.0, max(by_steps, by_time))

    def done(self) -> bool:
        """Whether a limit is reached: steps, time, or the end of a cool-down.

        Time alone does not end a run whose learning rate has not come to its end, because a step or an evaluation took
        longer than was foreseen: one more step does.
        """
        progress = self.progress
        if self.total_steps and progress.step >= self.total_steps:
            return True
        if progress.cooldown_step >= 0 and progress.step >= progress.cooldown_step + progress.cooldown_steps:
            return True
        return bool(self._limit_s) and self._decay >= 1 and progress.elapsed_s >= self._limit_s

    def remaining_s(self, chars_per_s: float) -> float:
        """Seconds to the nearer limit at that speed; infinite without one."""
        left = math.inf
        if self.total_steps:
            chars = self._config.data.batch_size * self._config.data.seq_len
            left = (self.total_steps - self.progress.step) * chars / chars_per_s
        return min(left, self._limit_s - self.progress.elapsed_s) if self._limit_s else left

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
        """Whether an evaluation is due, by its steps or as one of the `eval.times` spread over the run."""
        times = self._config.eval.times
        by_share = int(self.share() * times) > int(self.progress.evaluated_share * times)
        return by_share or self._is_due(self._config.eval.every, 0.0)

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
        """Note an evaluation of the present step; True when it is the best so far. A NaN never is."""
        progress = self.progress
        progress.evaluated_step, progress.evaluated_share = progress.step, self.share()
        progress.evaluations += 1
        progress.evaluations_since_best += 1
        if not loss < (math.inf if progress.best_loss is None else progress.best_loss):
            return False
        progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
        return True

    def stop_early(self) -> bool:
        """Begin the cool-down after `eval.patience` evaluations without a better one; True when it begins now.

        It takes as many steps as there were since the best one.
        """
        progress, patience = self.progress, self._config.eval.patience
        if not patience or progress.cooldown_step >= 0 or progress.evaluations_since_best < patience:
            return False
        progress.cooldown_step, progress.cooldown_decay = progress.step, self._decay
        progress.cooldown_steps = max(1, progress.step - max(0, progress.best_step))
        return True

    def _is_due(self, every: int | str, last_s: float) -> bool:
        """every: steps, or a duration as text. last_s: the run's time when it was due last."""
        if isinstance(every, str):
            return self.progress.elapsed_s - last_s >= seconds(every)
        return bool(every) and self.progress.step % every == 0
