"""Trainer: the loop, top to bottom. Letters: B batch_size (global), T seq_len, V vocabulary size."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from charrnn.config import RunConfig
from charrnn.data.corpus import LEAST_EVALUATED, Corpus
from charrnn.errors import CharRNNError
from charrnn.model.rnn import CharRNN, NextCharLoss, State, detach, zeroed
from charrnn.windows import Batch, rank_slice
from train.checkpoint.async_writer import AsyncWriter
from train.checkpoint.format import BEST, load_for_inference
from train.checkpoint.rng import seed_rank
from train.checkpoint.vocab_transfer import StartingPoint
from train.cuda_graph import graph_update, on_stream, side_stream
from train.dataloader import IdSource, check_inside, to_device, total_steps, window_plan
from train.distributed.collectives import Collectives, StepStatus, check_same_batch
from train.distributed.setup import compress_gradients
from train.distributed.signals import StopSignals
from train.errors import is_out_of_memory, memory_explained, out_of_memory
from train.evaluate import evaluate, sample_text
from train.flops import flops_per_char
from train.metrics import Figures
from train.optimizer import lr_at, make_optimizer
from train.progress import Pace, Progress
from train.state import capture, restore
from train.tracking.recorder import Recorder
from train.tracking.summary import pace_line

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on one corpus, in one process or as one rank of several."""

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
        collectives: Collectives | None = None,
        signals: StopSignals | None = None,
        heartbeat: Callable[..., None] = lambda *_: None,
        peak_flops: float | None = None,
    ) -> None:
        """clock: seconds. signals: asked between updates whether to stop. heartbeat: called as it goes on.

        peak_flops: FLOP/s that all the run's devices do at best; None when that is not known.
        """
        self.config, self.corpus, self.vocab = config, corpus, start.vocab
        self.accelerator, self.run_dir, self.recorder, self.clock = accelerator, run_dir, recorder, clock
        self.collectives, self.signals, self.heartbeat = (
            collectives or Collectives(accelerator),
            signals or StopSignals(),
            heartbeat,
        )
        self.device = accelerator.device
        # Together: what doesn't fit one rank's device ends all of them, before DDP waits for it.
        self.train_ids, self.val_ids, self.model = self.collectives.run_on_all(lambda: self._placed(start))
        self.plan = window_plan(config, len(self.train_ids))
        self.rows = rank_slice(config.data.batch_size, accelerator.process_index, accelerator.num_processes)
        self.total_steps = total_steps(config, self.plan.steps_per_epoch)
        optimizer = make_optimizer(self.model, config.optim)
        stream = side_stream(self.device)
        with on_stream(stream):
            self.loss_module, self.optimizer = accelerator.prepare(NextCharLoss(self.model), optimizer)
        compress_gradients(self.loss_module, config.train.grad_compression)
        self.model.flatten_parameters()
        seed_rank(config.train.seed, 0, accelerator.process_index)  # other dropout masks on every rank
        self.carried = self.model.zero_state(self.rows.stop - self.rows.start, self.device)
        self.progress, self._pace = Progress(), Pace()
        self._decay = 1.0
        self.flops_per_char, self._peak_flops = flops_per_char(config.model, len(self.vocab)), peak_flops
        self.metrics: dict[str, float] = {}
        self.stopped_by = 0
        self._figures = Figures(accelerator, run_dir)
        self.writer = AsyncWriter(run_dir, config.checkpoint.keep)  # only the main process gives it something to write
        self._fault: CharRNNError | None = None
        self._upcoming: tuple[Batch, Tensor] | None = None
        self._logged_at = self._started = self._resumed_s = 0.0
        self._pace_said = False
        self._best_unsaved = False
        self._saved_step = -1
        if start.resumed:
            restore(self, start.resumed)
            self._saved_step = self.progress.step
        self.graphed = graph_update(
            self._update,
            accelerator,
            self.loss_module,
            self.optimizer,
            self.carried,
            config,
            stream,
            documents=self.vocab.document_end is not None,
        )
        self._start_clock()

    def _placed(self, start: StartingPoint) -> tuple[IdSource, IdSource, CharRNN]:
        """Training ids, validation ids and model on the device. Raises: TrainingError when its memory is too small."""
        with memory_explained(self.config):
            num_symbols = len(self.corpus.vocab)
            splits = (self.corpus.train, self.corpus.val)
            train_ids, val_ids = (IdSource(ids, self.device, start.table, num_symbols) for ids in splits)
            torch.manual_seed(self.config.train.seed)  # the same first weights on every rank
            model = CharRNN(self.config.model, len(self.vocab), self.vocab.document_end_id)
            if start.weights:
                model.load_state_dict(start.weights)
            return train_ids, val_ids, model.to(self.device)

    def fit(self) -> Progress:
        """Trains until the first limit is reached, or a signal asks to stop; returns where it stands then.

        A run that was stopped has a checkpoint of its last update, and the signal's number in `stopped_by`.

        Raises: TrainingError when the loss or gradient is not finite, or the device's memory does not suffice;
        CheckpointError when the disk refuses. Where one rank raises, all do.
        """
        self._start_clock()
        with self._ending_well():
            # What a stop cut off, or whose checkpoint is lost, is evaluated again.
            lost = self.progress.evaluations > 0 and self.progress.best_step < 0
            if lost or (self.progress.step and self._due(self.config.eval.every)):
                self.evaluate()
                self.save(step=False)
            while self._go_on():
                self.train_step()
                if self._due(self.config.log.every):
                    self.log()
                if self._due(self.config.eval.every) or self.progress.evaluation_due(self.config, self.total_steps):
                    self.evaluate()
                # The last checkpoint comes after the last evaluation, so that it knows of it.
                self.save(step=self._due(self.config.checkpoint.every) and not self._done())
            self.log()
            if not self.stopped_by:
                self.evaluate()
                if self.progress.evaluated_step != self.progress.step:
                    self._go_on()  # agrees on the signal that cut the evaluation off
            self.save(step=True)
            self._alone(self.writer.wait)
            self.collectives.raise_if_any(self._fault)
            if not self.stopped_by:
                self.evaluate_best()
        self.progress.elapsed_s = self.now()
        return self.progress

    def train_step(self) -> None:
        """One update: the windows of batch number `step`, forward, backward, clip, update."""
        lr = self._set_lr()
        batch, window = self._upcoming or self._read_batch()  # (B / world, T + 1)
        self._upcoming = None
        self.heartbeat(2 * self.progress.step)
        if self.graphed:
            loss, grad_norm = self.graphed(window, batch.reset[self.rows], lr)
            self.carried = self.graphed.state
        else:
            loss, grad_norm, self.carried = self._update(window, self._state_before(batch))
        self._figures.add(lr, loss, grad_norm)
        self.progress.step += 1
        self.heartbeat(2 * self.progress.step - 1)

    def _update(self, window: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Forward, backward, clip and optimizer step; what a CUDA graph captures, so the host may ask for no value.

        Args:
            window: This rank's ids, (B / world, T + 1).
            state: Each (L, B / world, H).

        Returns:
            Loss and gradient norm, each (), and the state after.
        """
        loss, after = self._accumulate(window, state)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm, after

    def _state_before(self, batch: Batch) -> State:
        """The state that the batch starts from, each (L, B / world, H): the last one's, zero in the rows to reset."""
        reset = batch.reset[self.rows]  # (B / world,)
        if reset.all():
            return self.model.zero_state(len(reset), self.device)
        return zeroed(self.carried, to_device(reset, self.device)) if reset.any() else self.carried

    def _read_batch(self) -> tuple[Batch, Tensor]:
        """The next global batch, and this rank's windows of it, (B / world, T + 1)."""
        batch = self.plan.batch(self.progress.step)
        starts = batch.starts[self.rows]  # (B / world,)
        check_inside(starts, self.plan.seq_len + 1, len(self.train_ids), self.progress.step)
        return batch, self.train_ids.windows(starts, self.plan.seq_len + 1)

    def _accumulate(self, window: Tensor, state: State) -> tuple[Tensor, State]:
        """Backward over equal micro-batches, so that the mean of their losses is the mean over all characters."""
        parts = self.config.train.accumulation_steps
        losses, states = [], []
        for i in range(parts):
            rows = rank_slice(len(window), i, parts)
            last = i == parts - 1
            # Gradients cross the ranks once an update, with the last micro-batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.loss_module):
                loss, after = self.loss_module(window[rows], tuple(part[:, rows].contiguous() for part in state))
                self.accelerator.backward(loss / parts)
            losses.append(loss.detach())
            states.append(detach(after))
        merged = tuple(torch.cat(part, dim=1) for part in zip(*states, strict=True))  # each (L, B / world, H)
        return torch.stack(losses).mean(), merged

    def _go_on(self) -> bool:
        """Reads the next batch, and agrees with the other ranks on whether to train on it.

        Raises, on every rank: the error that one of them has met.
        """
        batch = None
        try:
            batch, _ = self._upcoming = self._read_batch()
        except CharRNNError as error:
            self._fault = self._fault or error
        self._fault = self._fault or self.writer.error()
        starts = batch.starts if batch else self.plan.batch(self.progress.step).starts
        status = self.collectives.all_gather_status(
            StepStatus(self.signals.received, self._fault is not None, self.now(), starts)
        )
        if status.failed_ranks:
            self.collectives.raise_if_any(self._fault)
        check_same_batch(status, self.progress.step + 1)
        self.stopped_by = status.stop_signal
        self.progress.elapsed_s = status.elapsed_s
        self._pace.update_begins(status.elapsed_s, evaluated=self.progress.evaluated_step == self.progress.step)
        return not (self.stopped_by or self._done())

    def log(self) -> None:
        """Records the mean loss since the last record. Raises: TrainingError when one of those losses is not finite."""
        self._figures.fetch(self.progress.step)
        updates, figures = self._figures.take()
        if not updates:
            return
        now = self.clock()
        chars = updates * self.config.data.batch_size * self.config.data.seq_len
        per_s = chars / max(now - self._logged_at, 1e-9)
        figures |= {"train/chars_per_s": per_s, **self._compute_figures(per_s)}
        self._logged_at = now
        self.metrics |= figures
        if not self._pace_said:
            self._pace_said = True
            steps_left = self.total_steps - self.progress.step if self.total_steps else math.inf
            limit_s = self.config.train.time_limit or math.inf
            cpu_share = self.cpu_share() if self.device.type == "cpu" else None
            time_left_s = limit_s - self.progress.elapsed_s
            logger.info(pace_line(figures, steps_left, time_left_s, chars // updates, cpu_share))
        self._record({**figures})

    def _compute_figures(self, chars_per_s: float) -> dict[str, float]:
        """GFLOP/s of all devices, and their share of the peak (model FLOPs utilisation) where that is known."""
        flops = chars_per_s * self.flops_per_char
        return {"train/gflops": flops / 1e9, **({"train/mfu": flops / self._peak_flops} if self._peak_flops else {})}

    def evaluate(self) -> None:
        """Both protocols on the validation split, and a sample. The best so far is written by the next `save`."""
        progress = self.progress
        if progress.evaluated_step == progress.step:
            return
        self._figures.fetch(progress.step)
        began = self.clock()
        figures: dict[str, float | str] = {}
        # Without a validation split the newest model is the best there is.
        loss = -float(progress.step)
        if len(self.val_ids) > 1:
            losses = self._losses(self.config.eval.sample)
            if not losses:  # a stop cut it off; the resumed run makes up for it
                return
            self.metrics |= losses
            figures |= losses
            loss = losses[f"val/{self.config.eval.best_by}/loss"]
        if self._sample_due() and self.accelerator.is_main_process:
            self._alone(lambda: figures.update(sample=self._sample()))
        if figures:
            self._record(figures)
        self._best_unsaved = progress.evaluated(loss, progress.share(self.config, self.total_steps))
        if progress.stop_early(self.config.eval.patience, self._decay):
            logger.info(
                f"no better evaluation since step {progress.best_step:,}: decaying the learning rate over the next "
                f"{progress.cooldown_steps:,} steps, then stopping"
            )
        # Evaluation is not training: its time stays out of chars/s.
        self._logged_at += self.clock() - began

    def _losses(self, sample: int) -> dict[str, float]:
        return evaluate(
            self.model,
            self.val_ids,
            self.config.eval,
            self.accelerator,
            self.heartbeat,
            sample=sample,
            stopped=lambda: self.signals.received,
        )

    def _sample(self) -> str:
        with memory_explained(self.config):
            return sample_text(self.model, self.vocab, self.config.sample, self.device)

    def _sample_due(self) -> bool:
        """Every `sample.every`-th evaluation writes a sample, and so does the last."""
        config = self.config.sample
        return bool(config.length) and (self._done() or (self.progress.evaluations + 1) % config.every == 0)

    def evaluate_best(self) -> None:
        """Both protocols on the complete validation split for the weights of best/, if so far they were estimated.

        The losses go into metrics.jsonl and best/ itself. The model is left with those weights.
        """
        if not self.config.eval.sample or len(self.val_ids) < LEAST_EVALUATED:
            return
        best = self.collectives.run_on_all(lambda: load_for_inference(self.run_dir / BEST))
        if "final" in best.trainer:
            return
        self.model.load_state_dict(best.weights)
        losses = self._losses(0)
        if losses and self.accelerator.is_main_process:
            record = {**best.trainer, "final": True, "metrics": {**best.trainer["metrics"], **losses}}
            self.writer.save(replace(best, trainer=record), best=True, step=False)
            self._alone(self.writer.wait)
            self._record({**losses})
        self.collectives.raise_if_any(self._fault)

    def save(self, *, step: bool) -> None:
        """Begins to write what is due: `best/` after a better evaluation, and with `step` a step checkpoint.

        From the latter a run continues bit for bit. The disk is waited for only if it is not done with the one before.
        """
        best, self._best_unsaved = self._best_unsaved, False
        # The first best/ comes with a step checkpoint: without one the run could not be resumed.
        step = (step or (best and self._saved_step < 0)) and self._saved_step != self.progress.step
        if not (step or best):
            return
        self._figures.fetch(self.progress.step)  # never a checkpoint of weights that are not finite
        began = self.clock()
        if step:
            self._saved_step = self.progress.step
        state = capture(self, whole=step)
        if self.accelerator.is_main_process:
            self._alone(lambda: self.writer.save(state, best=best, step=step))
        self._logged_at += self.clock() - began

    def _alone(self, action: Callable[[], None]) -> None:
        """Does what this rank alone does; an error waits for the next exchange, so that all ranks end together."""
        try:
            action()
        except CharRNNError as error:
            self._fault = self._fault or error

    @contextlib.contextmanager
    def _ending_well(self) -> Iterator[None]:
        """After an error in the block, lets the checkpoint in flight reach the disk, and explains a lack of memory."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(CharRNNError):  # the first error is the one to tell of
                self.writer.wait()
            if is_out_of_memory(error):
                raise out_of_memory(self.config, str(error)) from None
            raise

    def _set_lr(self) -> float:
        self._decay = self.progress.decay(self.config, self.total_steps, self._pace.step_s)
        lr = lr_at(self.progress.step, self.config.optim, self._decay)
        if not self.graphed:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        return lr

    def _start_clock(self) -> None:
        self._resumed_s = self.progress.elapsed_s
        self._logged_at = self._started = self.clock()
        self._cpu_began, self._wall_began = time.process_time(), time.perf_counter()

    def cpu_share(self) -> float:
        """The share of its threads' time that this process has had on the cores since training began."""
        wall = time.perf_counter() - self._wall_began
        return (time.process_time() - self._cpu_began) / max(wall * torch.get_num_threads(), 1e-9)

    def now(self) -> float:
        """Seconds of training and evaluation, over all segments, by this process's clock."""
        return self._resumed_s + self.clock() - self._started

    def _done(self) -> bool:
        return self.progress.done(self.config, self.total_steps, decayed=self._decay >= 1)

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def chars(self) -> int:
        """Characters trained on so far, over all ranks and segments."""
        return self.progress.step * self.config.data.batch_size * self.config.data.seq_len

    def _record(self, values: dict[str, float | str]) -> None:
        head = {"step": self.progress.step, "time_s": round(self.now(), 3), "chars": self.chars()}
        self._alone(lambda: self.recorder.record({**head, **values}))
