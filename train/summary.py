"""What a run prints before its first step, when it is stopped, and at its end."""

import math
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from charrnn.config import RunConfig, TrainConfig
from charrnn.data.stats import NGRAM_ORDER, entropies
from charrnn.errors import listing
from charrnn.windows import SPLITS
from train.checkpoint.format import Checkpoint, step_folders, step_of
from train.checkpoint.vocab_transfer import StartingPoint
from train.distributed.precision import describe_precision
from train.distributed.setup import device_name
from train.loop.dataloader import TrainingData
from train.loop.schedule import Progress
from train.tracking.console import format_duration


def opening_lines(
    config: RunConfig,
    data: TrainingData,
    start: StartingPoint,
    accelerator: Accelerator,
    run_dir: Path,
    num_parameters: int,
    total_steps: int,
) -> list[str]:
    """Device, model, corpus and length of the run.

    Args:
        config: The resolved config.
        data: Splits, batches and vocabulary.
        start: Where the run starts.
        accelerator: Devices, processes and precision.
        run_dir: The run folder.
        num_parameters: Of the model.
        total_steps: 0 if only time limits the run.
    """
    model, windows = config.model, config.data
    origin = "new, from given weights" if start.weights else "new"
    if start.resumed:
        origin = f"resumed at step {start.resumed.step:,}"
    return [
        f"run       {run_dir} ({origin})",
        f"device    {_device(config.train, accelerator)}",
        f"model     {model.rnn} {model.num_layers} x {model.hidden_dim}, embedding {model.embedding_dim}, "
        f"dropout {model.dropout:g}: {num_parameters:,} parameters",
        *text_lines(data, start.new),
        f"training  {_length(total_steps, config.train.time_limit)}; {windows.windows} windows of {windows.seq_len} "
        f"characters, {windows.batch_size} a step, {data.plan.steps_per_epoch:,} steps an epoch",
    ]


def text_lines(data: TrainingData, new: Sequence[str]) -> list[str]:
    """The text, and what to compare the loss with. new: characters that the given weights lack."""
    corpus, vocab, train = data.corpus, data.vocab, data.train
    splits = zip(SPLITS, (corpus.train, corpus.val, corpus.test), strict=True)
    lines = [
        f"corpus    {corpus.name}: {corpus.num_chars:,} characters "
        f"({', '.join(f'{name} {len(ids):,}' for name, ids in splits)}), "
        f"vocabulary of {len(vocab)} {'bytes' if vocab.kind == 'bytes' else 'characters'}",
    ]
    if new:
        lines.append(
            f"new       {len(new)} character(s) that the given weights lack start from their plain forms or the mean: "
            f"{listing([repr(c) for c in new], 20)}"
        )
    if not train.is_resident and train.device.type != "cpu":
        lines.append(
            f"ids       the training split of {len(train):,} characters would take more than half of the GPU's free "
            "memory, and is read from the host"
        )
    if generated := len(train) - len(corpus.train):
        lines.append(f"generated {generated:,} characters by the teachers, trained on as well")
    lines.append(f"entropy   {entropies(corpus.train, len(corpus.vocab)).line()}")
    if (nats := corpus.ngram_loss) is not None:
        lines.append(
            f"baseline  {nats:.4f} nats/char, {nats / math.log(2):.4f} bits/char on the validation split "
            f"(interpolated Kneser-Ney {NGRAM_ORDER}-grams)"
        )
    return lines


def _device(train: TrainConfig, accelerator: Accelerator) -> str:
    """Devices, processes, threads and precision."""
    device, processes = accelerator.device, accelerator.num_processes
    name = device_name(device) if device.type == "cpu" else f"{processes} x {device_name(device)}"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    requested = launched if train.mixed_precision == "auto" else train.mixed_precision
    precision = describe_precision(requested, accelerator.mixed_precision, device.type)
    return f"{name}, {processes} process(es) x {torch.get_num_threads()} CPU thread(s), precision {precision}"


def _length(total_steps: int, time_limit_s: float) -> str:
    steps = f"{total_steps:,} steps" if total_steps else ""
    clock = format_duration(time_limit_s) if time_limit_s else ""
    return f"{steps} or {clock}, whichever ends first" if steps and clock else steps or clock


def noise_line(windows: float, batch_size: int) -> str:
    """Up to which batch size more devices would have helped. windows: the gradient noise scale."""
    scale = max(1, round(windows))
    verdict = (
        f"a batch of more than {scale:,} brings little: more devices would not have helped"
        if batch_size >= scale
        else f"more devices would have helped up to a batch of about {scale:,}"
    )
    return f"scale     gradient noise scale {scale:,} windows, batch_size {batch_size:,}: {verdict}"


def resume_hint(run_dir: Path) -> str:
    """How to resume the run, and from which step."""
    saved = step_folders(run_dir)
    return f"rerun the same command to {f'resume from step {step_of(saved[0]):,}' if saved else 'start over'}"


def stopped_line(signal_number: int, step: int, run_dir: Path) -> str:
    """Why and where a run was stopped."""
    return f"stopped by {signal.Signals(signal_number).name} after step {step:,}; {resume_hint(run_dir)}"


def closing_lines(
    data: TrainingData, progress: Progress, best: Checkpoint, run_dir: Path, model_file: Path, difference: float
) -> list[str]:
    """Results, files and the next command.

    Args:
        data: The corpus and the model's vocabulary.
        progress: At the run's end.
        best: The exported checkpoint.
        run_dir: The run folder.
        model_file: The exported file.
        difference: Largest difference between its logits and torch's.
    """
    metrics = best.trainer["metrics"]
    losses = [
        f"          {name:<8}{metrics[f'val/{name}/loss']:.4f} nats/char  {metrics[f'val/{name}/bpc']:.4f} bits/char"
        for name in ("stream", "windows")
        if f"val/{name}/loss" in metrics
    ]
    if "train/noise_scale" in metrics:
        losses.append(noise_line(metrics["train/noise_scale"], best.config.data.batch_size))
    loss, baseline = metrics.get("val/stream/loss"), data.corpus.ngram_loss
    if loss is not None and baseline is not None and loss > baseline:
        losses.append(
            f"warning   stream {loss:.4f} is worse than the n-gram baseline of {baseline:.4f} nats/char; train longer "
            "(--time-limit, --epochs), start from pretrained weights (--init-from base) or add text"
        )
    size = model_file.stat().st_size / 2**20
    prompt = ' -p "ROMEO:"' if not data.vocab.unknown_in("ROMEO:") else ""
    return [
        f"done      {progress.step:,} steps, {progress.elapsed_s:,.0f} s; best at step {best.step:,}",
        *losses,
        f"files     {run_dir}{os.sep}: best, config.yaml, metrics.jsonl",
        f"model     {model_file} ({size:.1f} MiB, differs from torch by {difference:.0e} at most)",
        f"next      infer generate -m {shlex.quote(str(model_file))}{prompt}",
    ]
