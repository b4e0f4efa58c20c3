"""Trainer: the loop, top to bottom. Letters: B batch_size (global), T seq_len, V vocabulary size."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from charrnn import checkpoint as checkpoints
from charrnn.config import RunConfig
from charrnn.corpus import Corpus
from charrnn.model import CharRNN, NextCharLoss, State, detach
from charrnn.windows import rank_slice
from train.batches import IdSource, total_steps, window_plan
from train.evaluate import evaluate, sample_text
from train.faults import check_finite, out_of_memory
from train.optimizer import lr_at, make_optimizer
from train.progress import Progress
from train.recorder import Recorder
from train.report import device_name, pace_line
from train.resume import StartingPoint, identity_fields, rank_rng, scatter_state, seed_rank, set_rank_rng


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
    ) -> None:
        self.config, self.corpus, self.vocab = config, corpus, start.vocab
        self.accelerator, self.run_dir, self.recorder, self.clock = accelerator, run_dir, recorder, clock
        self.device = accelerator.device
        self.train_ids = IdSource(corpus.train, self.device, start.table)
        self.val_ids = IdSource(corpus.val, self.device, start.table)
        self.plan = window_plan(config, len(self.train_ids))
        self.rows = rank_slice(config.data.batch_size, accelerator.process_index, accelerator.num_processes)
        self.total_steps = total_steps(config, self.plan.steps_per_epoch)

        torch.manual_seed(config.train.seed)  # the same first weights on every rank
        self.model = CharRNN(config.model, len(self.vocab))
        if start.weights:
            self.model.load_state_dict(start.weights)
        optimizer = make_optimizer(self.model, config.optim)
        self.loss_module, self.optimizer = accelerator.prepare(NextCharLoss(self.model), optimizer)
        self.model.rnn.flatten_parameters()
        seed_rank(config.train.seed, 0, accelerator.process_index)  # other dropout masks on every rank
        self.carried = self.model.zero_state(self.rows.stop - self.rows.start, self.device)
        self.progress = Progress()
        self.metrics: dict[str, float] = {}
        self._pending: list[tuple[float, Tensor, Tensor]] = []  # lr, loss, gradient norm, the latter on the device
        self._fetched: list[tuple[float, float, float]] = []  # the same on the host, not yet logged
        self._resumed_s = 0.0
        self._pace_said = False
        self._started = self._logged_at = self.clock()
        self._saved_step = -1
        if start.resumed:
            self._restore(start.resumed)

    def fit(self) -> Progress:
        """Trains until the first limit is reached; returns where it stands then.

        Raises: TrainingError when the loss or gradient is not finite, or the device's memory does not suffice.
        """
        self._resumed_s = self.progress.elapsed_s
        self._started = self._logged_at = self.clock()
        log_every, eval_every = self.config.log.every, self.config.eval.every
        try:
            while not self._done():
                self.train_step()
                if self._due(log_every):
                    self.log()
                if self._due(eval_every):
                    self.evaluate()
                # The last checkpoint comes after the last evaluation, so that it knows of it.
                if self._due(self.config.checkpoint.every) and not self._done():
                    self.save()
            self.log()
            self.evaluate()
            self.save()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.config, str(error)) from None
        return self.progress

    def train_step(self) -> None:
        """One update: the windows of batch number `step`, forward, backward, clip, update."""
        lr = self._set_lr()
        batch = self.plan.batch(self.progress.step)
        window = self.train_ids.windows(batch.starts[self.rows], self.plan.seq_len + 1)  # (B / world, T + 1)
        state = self.model.zero_state(len(window), self.device) if batch.fresh else self.carried
        loss, self.carried = self._accumulate(window, state)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._pending.append((lr, loss, grad_norm))
        self.progress.step += 1
        self._tick()

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

    def log(self) -> None:
        """Records the mean loss since the last record. Raises: TrainingError when one of those losses is not finite."""
        self._fetch()
        if not self._fetched:
            return
        lrs, losses, norms = zip(*self._fetched, strict=True)
        self._fetched.clear()
        now = self.clock()
        chars = len(losses) * self.config.data.batch_size * self.config.data.seq_len
        mean = sum(losses) / len(losses)
        self.metrics |= {
            "train/loss": mean,
            "train/bpc": mean / math.log(2),
            "train/lr": lrs[-1],
            "train/grad_norm": norms[-1],
            "train/chars_per_s": chars / max(now - self._logged_at, 1e-9),
        }
        self._logged_at = now
        if not self._pace_said:
            self._pace_said = True
            self.recorder.message(pace_line(self, self.metrics["train/chars_per_s"]))
        self._record({k: v for k, v in self.metrics.items() if k.startswith("train/")})

    def _fetch(self) -> None:
        """Brings the figures of the latest updates to the host, all at once, and checks them."""
        if not self._pending:
            return
        lrs = [lr for lr, _, _ in self._pending]
        figures = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in self._pending])  # (n, 2)
        self._pending.clear()
        if self.accelerator.num_processes > 1:
            figures = self.accelerator.reduce(figures, "mean")
        losses, norms = figures.T.tolist()
        # Under fp16 an infinite gradient is the loss scaler's business: it skips that update and lowers the scale.
        checked_norms = None if self.accelerator.scaler else norms
        check_finite(self.progress.step, lrs, losses, checked_norms, self.run_dir)
        self._fetched += zip(lrs, losses, norms, strict=True)

    def evaluate(self) -> None:
        """Both protocols on the validation split, a sample, and `best/` when this is the best so far."""
        progress = self.progress
        if progress.evaluated_step == progress.step:
            return
        self._fetch()
        began = self.clock()
        figures: dict[str, float | str] = {}
        # Without a validation split the newest model is the best there is.
        loss = -float(progress.step)
        if len(self.val_ids) > 1:
            losses = evaluate(self.model, self.val_ids, self.config.eval, self.accelerator)
            self.metrics |= losses
            figures |= losses
            loss = losses[f"val/{self.config.eval.best_by}/loss"]
        if self.config.sample.length and self.accelerator.is_main_process:
            figures["sample"] = sample_text(self.model, self.vocab, self.config.sample, self.device)
        if figures:
            self._record(figures)
        if progress.evaluated(loss) and self.accelerator.is_main_process:
            checkpoints.save_best(self.run_dir, self._checkpoint())
        # Evaluation is not training: its time stays out of chars/s.
        self._logged_at += self.clock() - began
        self._tick()

    def save(self) -> None:
        """Writes a step checkpoint, from which a run continues bit for bit."""
        if self._saved_step == self.progress.step:
            return
        self._fetch()  # never a checkpoint of weights that are not finite
        began = self.clock()
        self._saved_step = self.progress.step
        rng = rank_rng(self.accelerator)
        carried = tuple(self.accelerator.gather(p.transpose(0, 1).contiguous()).transpose(0, 1) for p in self.carried)
        if self.accelerator.is_main_process:
            whole = self._checkpoint(
                optimizer=checkpoints.optimizer_tensors(self.model, self.optimizer.optimizer), carried=carried, rng=rng
            )
            checkpoints.save_step(self.run_dir, whole, self.config.checkpoint.keep)
        self._logged_at += self.clock() - began

    def _checkpoint(self, **training: object) -> checkpoints.Checkpoint:
        scaler = self.accelerator.scaler
        trainer = {
            **vars(self.progress),
            "num_processes": self.accelerator.num_processes,
            "loss_scale": scaler.state_dict() if scaler else None,
            "corpus": identity_fields(self.corpus),
            "metrics": self._file_metrics(),
        }
        return checkpoints.Checkpoint(self.config, self.vocab, self.model.state_dict(), trainer, **training)  # type: ignore[arg-type]

    def _file_metrics(self) -> dict[str, object]:
        """What a model file says of its own making."""
        return {
            "step": self.progress.step,
            "chars": self._chars(),
            "time_s": round(self.progress.elapsed_s, 3),
            "parameters": self.model.num_parameters(),
            "processes": self.accelerator.num_processes,
            "hardware": device_name(self.device),
            "precision": self.accelerator.mixed_precision,
            **self.metrics,
        }

    def _restore(self, saved: checkpoints.Checkpoint) -> None:
        """Puts back what is not in the weights: optimizer, carried state, random generators, clock, best."""
        checkpoints.restore_optimizer(self.model, self.optimizer.optimizer, saved.optimizer)
        self.carried = scatter_state(saved.carried, self.rows, self.device)
        set_rank_rng(self.accelerator, saved, self.config.train.seed, self.recorder.message)
        self.progress = Progress(**{name: saved.trainer[name] for name in vars(self.progress)})
        if self.accelerator.scaler and saved.trainer["loss_scale"]:
            self.accelerator.scaler.load_state_dict(saved.trainer["loss_scale"])
        self.metrics = {k: v for k, v in saved.trainer["metrics"].items() if "/" in k}
        self._saved_step = self.progress.step

    def _set_lr(self) -> float:
        lr = lr_at(self.progress.step, self.config.optim, self.progress.decay(self.config, self.total_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _tick(self) -> None:
        """Moves the run's clock on. Rank 0's clock is everybody's, since the learning rate may depend on it."""
        elapsed = self._resumed_s + self.clock() - self._started
        if self.config.train.time_limit and self.accelerator.num_processes > 1:
            if self.progress.step % self.config.log.every:
                return
            shared = torch.tensor([elapsed], dtype=torch.float32, device=self.device)
            torch.distributed.broadcast(shared, src=0)
            elapsed = shared.item()
        self.progress.elapsed_s = elapsed

    def _done(self) -> bool:
        return self.progress.done(self.config, self.total_steps)

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _chars(self) -> int:
        return self.progress.step * self.config.data.batch_size * self.config.data.seq_len

    def _record(self, values: dict[str, float | str]) -> None:
        head = {"step": self.progress.step, "time_s": round(self.progress.elapsed_s, 3), "chars": self._chars()}
        self.recorder.record({**head, **values})
