"""Trainer: the loop, top to bottom. Letters: B batch_size (global), T seq_len, L num_layers, H hidden_dim."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from charrnn.config import RunConfig
from charrnn.data.corpus import LEAST_EVALUATED, Corpus
from charrnn.errors import CharRNNError
from charrnn.model.rnn import CharRNN, NextCharLoss
from charrnn.windows import Batch, rank_slice
from train.checkpoint.async_writer import CheckpointWriter
from train.checkpoint.folders import BEST
from train.checkpoint.format import (
    Checkpoint,
    load_for_inference,
    network,
    optimizer_tensors,
    restore_optimizer,
    snapshot,
)
from train.checkpoint.resume import identity_fields
from train.checkpoint.rng import rank_rng, restore_rank_rng, seed_rank
from train.checkpoint.vocab_transfer import StartingPoint
from train.distributed.collectives import Collectives
from train.distributed.setup import compress_gradients, device_name
from train.distributed.signals import StopSignals
from train.loop.control import Control
from train.loop.cuda_graph import on_stream, side_stream
from train.loop.dataloader import IdSource, TrainingData, window_plan
from train.loop.distill import with_targets
from train.loop.errors import memory_explained
from train.loop.evaluation import evaluate, sample_text
from train.loop.flops import flops_per_char
from train.loop.metrics import CpuShare, Metrics
from train.loop.noise_scale import NoiseScale
from train.loop.optimizer import make_optimizer
from train.loop.schedule import Progress, Schedule
from train.loop.train_step import TrainStep
from train.tracking.console import pace_line
from train.tracking.recorder import Recorder

logger = logging.getLogger(__name__)

# Times `eval.sample`, from which the last weights and the best are compared.
_LARGER = 4


class Trainer:
    """Trains one model on one corpus, in one process or as one rank of several.

    Attributes:
        data: Splits, batches and vocabulary.
        model: The network, without wrappers.
        update: One optimizer step; holds the hidden state.
        schedule: Clock, limits, learning rate, progress.
        metrics: Loss, gradient norm and speed.
        noise_scale: Running estimate of the gradient noise scale.
        checkpoints: What is written when.
        control: Errors, stop signals and the other ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        start: StartingPoint,
        accelerator: Accelerator,
        run_dir: Path,
        recorder: Recorder,
        clock: Callable[[], float] = time.monotonic,
        *,
        control: Control | None = None,
        peak_flops: float | None = None,
    ) -> None:
        """Build model and optimizer on the device, and restore what the run resumes from.

        Args:
            config: The run's.
            corpus: The text.
            start: Vocabulary, and weights or checkpoint to start from.
            accelerator: Device, precision and ranks.
            run_dir: The run folder.
            recorder: Where metrics and messages go.
            clock: Seconds.
            control: The ranks, and the stop signals looked at between steps; None makes it from the accelerator.
            peak_flops: FLOP/s that all devices do at best; None when that is not known.
        """
        self.config, self.accelerator, self.recorder = config, accelerator, recorder
        self.control = control or Control(Collectives(accelerator), StopSignals())
        # What doesn't fit one rank's device ends all of them, before DDP waits for it.
        self.data, self.model = self.control.collectives.run_on_all(lambda: _placed(config, corpus, start, accelerator))
        if config.distill.teachers:
            self.data = with_targets(config, self.data, start.resumed, accelerator, self.control)
        optimizer = make_optimizer(self.model, config.optim)
        stream = side_stream(accelerator.device)
        with on_stream(stream):
            loss = NextCharLoss(self.model, config.distill.weight, config.distill.temperature)
            loss_module, prepared = accelerator.prepare(loss, optimizer)
        compress_gradients(loss_module, config.train.grad_compression)
        seed_rank(config.train.seed, 0, accelerator.process_index)  # other dropout masks on every rank
        rows = self.data.rows
        self.update = TrainStep(
            accelerator,
            loss_module,
            prepared.optimizer,
            self.model.zero_state(rows.stop - rows.start, self.data.train.device),
            accumulation_steps=config.train.accumulation_steps,
            grad_clip=config.optim.grad_clip,
        )
        self.schedule = Schedule(config, self.data.plan.steps_per_epoch, clock)
        self.metrics = Metrics(
            accelerator,
            run_dir,
            chars_per_step=config.data.batch_size * config.data.seq_len,
            flops_per_char=flops_per_char(config.model, len(start.vocab)),
            peak_flops=peak_flops,
            clock=clock,
        )
        self.noise_scale = NoiseScale()
        self.checkpoints = CheckpointWriter(run_dir, config.checkpoint.keep)
        self._upcoming: tuple[Batch, Tensor, Tensor | None] | None = None
        self._best_by = f"val/{config.eval.best_by}/loss"
        self._cpu_share: CpuShare | None = None  # until the pace has been shown
        if start.resumed:
            self.load_state_dict(start.resumed)
        self.update.capture(config, stream, documents=start.vocab.document_end is not None)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.schedule.progress

    def fit(self) -> Progress:
        """Train until the first limit is reached, or a signal asks to stop.

        A run that was stopped has a checkpoint of its last step, and the signal's number in `control.stopped_by`.

        Returns:
            Where the run stands then.

        Raises:
            TrainingError: The loss or gradient is not finite.
            CheckpointError: The disk refuses. Where one rank raises, all do.
        """
        self.schedule.start()
        self.metrics.start()
        self._cpu_share = CpuShare()
        with self._finishing_writes():
            if self.schedule.evaluation_missing():
                self.evaluate()
                self.save(step=False)
            while self.next_step():
                self.train_step()
                if self.schedule.log_due():
                    self.log()
                if self.schedule.evaluation_due():
                    self.evaluate()
                self.save(step=self.schedule.checkpoint_due())
            self._finish()
        self.progress.elapsed_s = self.schedule.now()
        return self.progress

    def next_step(self) -> bool:
        """Read the next batch, and agree with the other ranks on whether to train on it.

        Raises: on every rank, the error that one of them has met.
        """
        self._upcoming = None
        self.control.defer(self._read_ahead)
        self.control.note(self.checkpoints.error())
        step = self.progress.step
        starts = (self._upcoming[0] if self._upcoming else self.data.plan.batch(step)).starts
        self.schedule.begin_step(self.control.agree(step, starts, self.schedule.now()))
        return not (self.control.stopped_by or self.schedule.done())

    def train_step(self) -> None:
        """Make one step: the windows of batch number `step`, forward, backward, clip, optimizer."""
        progress, lr = self.progress, self.schedule.next_lr()
        # (B / world, T + 1), and with teachers (B / world, T, V)
        batch, window, targets = self._upcoming or self.data.read(progress.step)
        self._upcoming = None
        self.control.heartbeat(2 * progress.step)
        reset = batch.reset[self.data.rows]  # (B / world,)
        half = self.update.half_gradient(window, reset, targets) if self.schedule.noise_scale_due() else None
        loss, grad_norm = self.update(window, reset, lr, targets)
        self.metrics.add(lr, loss, grad_norm)
        progress.step += 1
        if half is not None:
            self.metrics.fetch(progress.step)
            square, rows = half
            self.noise_scale.measure(square, rows, self.metrics.last_norm() ** 2, self.config.data.batch_size)
        self.control.heartbeat(2 * progress.step - 1)

    def log(self) -> None:
        """Record the mean loss since the last record. Raises: TrainingError when a loss is not finite."""
        self.metrics.fetch(self.progress.step)
        values = self.metrics.take()
        if not values:
            return
        if (windows := self.noise_scale.windows) is not None:
            self.metrics.latest["train/noise_scale"] = values["train/noise_scale"] = windows
        if self._cpu_share:
            left_s = self.schedule.remaining_s(values["train/chars_per_s"])
            logger.info(
                pace_line(values, left_s, self.accelerator.device.type, self._cpu_share(), torch.get_num_threads())
            )
            self._cpu_share = None
        self._record(values)

    def evaluate(self) -> None:
        """Evaluate by both protocols on the validation split, and write a sample; `save` writes the best model."""
        progress = self.progress
        if progress.evaluated_step == progress.step:
            return
        self.metrics.fetch(progress.step)
        with self.metrics.untimed():
            values: dict[str, float | str] = {}
            # Without a validation split the newest model is the best there is.
            loss = -float(progress.step)
            if len(self.data.val) > 1:
                losses = self._losses(self.config.eval.sample)
                if not losses:  # a stop cut it off; the resumed run makes up for it
                    return
                self.metrics.latest |= losses
                values |= losses
                loss = losses[self._best_by]
            if self.schedule.sample_due() and self.accelerator.is_main_process:
                self.control.defer(lambda: values.update(sample=self._sample()))
            if values:
                self._record(values)
            self.checkpoints.best_unsaved = self.schedule.evaluated(loss)
            if self.schedule.stop_early():
                logger.info(
                    f"no better evaluation since step {progress.best_step:,}: decaying the learning rate over the next "
                    f"{progress.cooldown_steps:,} steps, then stopping"
                )

    def save(self, *, step: bool) -> None:
        """Begin to write what is due: `best/` after a better evaluation, and with `step` a step checkpoint.

        The disk is waited for only if it is not done with the one before.
        """
        best, step = self.checkpoints.take_due(self.progress.step, wanted=step)
        if not (step or best):
            return
        self.metrics.fetch(self.progress.step)  # never a checkpoint of weights that are not finite
        with self.metrics.untimed():
            state = self.state_dict(resumable=step)
            if self.accelerator.is_main_process:
                self.control.defer(lambda: self.checkpoints.save(state, best=best, step=step))

    def state_dict(self, *, resumable: bool = True) -> Checkpoint:
        """The present state of all ranks, every one of which must call this; the tensors are not copies.

        Args:
            resumable: With all from which the run continues bit for bit, not only what inference needs.
        """
        state = Checkpoint(self.config, self.data.vocab, self.model.state_dict(), self._trainer_record())
        if not resumable:
            return state
        return replace(
            state,
            optimizer=optimizer_tensors(self.model, self.update.optimizer),
            carried=self.update.gathered_state(),
            rng=tuple(self.control.collectives.all_gather(rank_rng(self.accelerator.device))),
        )

    def load_state_dict(self, saved: Checkpoint) -> None:
        """Restore what a resumable `state_dict` has returned."""
        self.model.load_state_dict(saved.weights)
        restore_optimizer(self.model, self.update.optimizer, saved.optimizer)
        self.update.restore_state(saved.carried, self.data.rows)
        restore_rank_rng(self.accelerator, saved, self.config)
        self.schedule.progress = Progress.of(saved.trainer)
        self.schedule.start()
        self.noise_scale = NoiseScale(**saved.trainer.get("noise_scale", {}))
        if self.update.scaler and saved.trainer["loss_scale"]:
            self.update.scaler.load_state_dict(saved.trainer["loss_scale"])
        self.metrics.latest = {name: value for name, value in saved.trainer["metrics"].items() if "/" in name}
        self.checkpoints.saved_step = saved.step

    def evaluate_best(self) -> None:
        """Evaluate the weights of best/ on the complete validation split, if so far their losses were estimates.

        First the last weights replace them if they are better by a larger estimate: the lowest of many small ones may
        be luck. The losses go into metrics.jsonl and best/ itself. The model is left with the weights of best/.
        """
        sample, step = self.config.eval.sample, self.progress.step
        if not sample or len(self.data.val) < LEAST_EVALUATED:
            return
        folder = self.checkpoints.run_dir / BEST
        best = self.control.collectives.run_on_all(lambda: load_for_inference(folder))
        if best.trainer.get("final") == step:
            return
        if best.step != step:
            last, loss_of_last = snapshot(self.state_dict(resumable=False)), self._loss(_LARGER * sample)
            self.model.load_state_dict(best.weights)
            if loss_of_last < self._loss(_LARGER * sample):
                best = last
        self.model.load_state_dict(best.weights)
        losses = self._losses(0)
        if losses and self.accelerator.is_main_process:
            record = {**best.trainer, "final": step, "metrics": {**best.trainer["metrics"], **losses}}
            self.checkpoints.save(replace(best, trainer=record), best=True, step=False)
            self.control.defer(self.checkpoints.wait)
            self._record(losses)
        self.control.raise_deferred()

    def chars(self) -> int:
        """Characters trained on so far, over all ranks and segments."""
        return self.progress.step * self.config.data.batch_size * self.config.data.seq_len

    def _read_ahead(self) -> None:
        self._upcoming = self.data.read(self.progress.step)

    def _finish(self) -> None:
        """Record, evaluate and save what the last step has left."""
        self.log()
        if not self.control.stopped_by:
            self.evaluate()
            if self.progress.evaluated_step != self.progress.step:
                self.next_step()  # agrees on the signal that cut the evaluation off
        self.save(step=True)
        self.control.defer(self.checkpoints.wait)
        self.control.raise_deferred()
        if not self.control.stopped_by:
            self.evaluate_best()

    @contextlib.contextmanager
    def _finishing_writes(self) -> Iterator[None]:
        """After an error in the block, let the checkpoint in flight reach the disk."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CharRNNError):  # the first error is the one to report
                self.checkpoints.wait()
            raise

    def _losses(self, sample: int) -> dict[str, float]:
        return evaluate(
            self.model,
            self.data.val,
            self.config.eval,
            self.accelerator,
            self.control.heartbeat,
            sample=sample,
            stopped=lambda: self.control.signals.received,
        )

    def _loss(self, sample: int) -> float:
        """The loss that selects the best checkpoint, NaN when a stop cuts the evaluation off."""
        return self._losses(sample).get(self._best_by, math.nan)

    def _sample(self) -> str:
        with memory_explained(self.config):
            return sample_text(self.model, self.data.vocab, self.config.sample, self.accelerator.device)

    def _trainer_record(self) -> dict[str, Any]:
        """The run's part of a checkpoint."""
        accelerator, scaler, elapsed_s = self.accelerator, self.update.scaler, self.schedule.now()
        metrics = {
            "step": self.progress.step,
            "chars": self.chars(),
            "time_s": round(elapsed_s, 3),
            "processes": accelerator.num_processes,
            "hardware": device_name(accelerator.device),
            "precision": accelerator.mixed_precision,
            "parameters": self.model.num_parameters(),
            **self.metrics.latest,
        }
        return {
            **vars(self.progress),
            "elapsed_s": elapsed_s,
            "num_processes": accelerator.num_processes,
            "loss_scale": scaler.state_dict() if scaler else None,
            "noise_scale": vars(self.noise_scale),
            "corpus": identity_fields(self.data.corpus),
            "teachers": list(self.data.targets.teachers) if self.data.targets else [],
            "metrics": metrics,
        }

    def _record(self, values: dict[str, Any]) -> None:
        head = {"step": self.progress.step, "time_s": round(self.schedule.now(), 3), "chars": self.chars()}
        self.control.defer(lambda: self.recorder.record({**head, **values}))


def _placed(
    config: RunConfig, corpus: Corpus, start: StartingPoint, accelerator: Accelerator
) -> tuple[TrainingData, CharRNN]:
    """Ids and model on the device. Raises: TrainingError when its memory is too small."""
    with memory_explained(config):
        device, num_symbols = accelerator.device, len(corpus.vocab)
        train, val = (IdSource(ids, device, start.table, num_symbols) for ids in (corpus.train, corpus.val))
        rows = rank_slice(config.data.batch_size, accelerator.process_index, accelerator.num_processes)
        data = TrainingData(corpus, start.vocab, train, val, window_plan(config, len(train)), rows)
        torch.manual_seed(config.train.seed)  # the same first weights on every rank
        return data, network(config.model, start.vocab, start.weights).to(device)
