"""What a run says before its first step, once its speed is known, and at its end."""

import math
import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from charrnn.data.corpus import Corpus
from charrnn.data.stats import NGRAM_ORDER, sampled_entropies
from charrnn.errors import listing
from charrnn.windows import SPLITS
from train.checkpoint.format import Checkpoint, step_folders, step_of
from train.checkpoint.resume import StartingPoint
from train.dataloader import IdSource
from train.precision import describe_precision
from train.probe import UNDISTURBED
from train.tracking.console import format_duration, format_share

if TYPE_CHECKING:
    from train.trainer import Trainer

_LONG_ON_CPU_S = 3600.0


def opening_lines(trainer: "Trainer", threads: int, start: StartingPoint) -> list[str]:
    """What is about to happen: device, model, corpus, steps."""
    config, accelerator, corpus = trainer.config, trainer.accelerator, trainer.corpus
    data, model, plan = config.data, config.model, trainer.plan
    if start.resumed:
        origin = f"resumed at step {start.resumed.step:,}"
    else:
        origin = "new, from given weights" if start.weights else "new"
    splits = (corpus.train, corpus.val, corpus.test)
    symbols = f"{len(trainer.vocab)} {'bytes' if trainer.vocab.kind == 'bytes' else 'characters'}"
    parts = ", ".join(f"{name} {len(ids):,}" for name, ids in zip(SPLITS, splits, strict=True))
    requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    requested = requested if config.train.mixed_precision == "auto" else config.train.mixed_precision
    precision = describe_precision(requested, accelerator.mixed_precision, trainer.device.type)
    windows = f"{data.windows} windows of {data.seq_len} characters, {data.batch_size} a step"
    return [
        f"run       {trainer.run_dir} ({origin})",
        f"device    {device_line(trainer)}, {accelerator.num_processes} process(es) x {threads} CPU thread(s), "
        f"precision {precision}",
        f"model     {model.rnn} {model.num_layers} x {model.hidden_dim}, embedding {model.embedding_dim}, "
        f"dropout {model.dropout:g}: {trainer.model.num_parameters():,} parameters",
        f"corpus    {corpus.name}: {corpus.num_chars:,} characters ({parts}), vocabulary of {symbols}",
        *new_lines(start),
        *placement_lines(trainer.train_ids),
        *entropy_lines(corpus),
        f"training  {length_line(trainer)}; {windows}, {plan.steps_per_epoch:,} steps an epoch",
    ]


def new_lines(start: StartingPoint) -> list[str]:
    """The characters that the given weights did not know."""
    if not start.new:
        return []
    names = listing([repr(c) for c in start.new], 20)
    what = f"{len(start.new)} character(s) that the given weights lack start from their plain forms or the mean"
    return [f"new       {what}: {names}"]


def placement_lines(ids: IdSource) -> list[str]:
    """A line where the training split does not fit on the GPU."""
    if ids.is_resident or ids.device.type == "cpu":
        return []
    return [
        f"ids       the training split of {len(ids):,} characters would take more than half of the GPU's free memory, "
        "and is read from the host"
    ]


def entropy_lines(corpus: Corpus) -> list[str]:
    """What to hold the loss against: the text's entropies, an n-gram model's loss, a random source's exact limit."""
    lines = [f"entropy   {sampled_entropies(corpus.train, len(corpus.vocab)).line()}"]
    if (nats := corpus.ngram_loss) is not None:
        lines.append(
            f"baseline  {nats:.4f} nats/char, {nats / math.log(2):.4f} bits/char on the validation split by counting "
            f"(interpolated Kneser-Ney {NGRAM_ORDER}-grams)"
        )
    return lines


def device_line(trainer: "Trainer") -> str:
    """The device's name, and how many there are in all."""
    name = device_name(trainer.device)
    return name if trainer.device.type == "cpu" else f"{trainer.accelerator.num_processes} x {name}"


def length_line(trainer: "Trainer") -> str:
    """How long the run is: steps, time, or whichever comes first."""
    limit = trainer.config.train.time_limit
    steps = f"{trainer.total_steps:,} steps" if trainer.total_steps else ""
    clock = f"{format_duration(limit)}" if limit else ""
    return f"{steps} or {clock}, whichever ends first" if steps and clock else steps or clock


def pace_line(trainer: "Trainer", figures: dict[str, float]) -> str:
    """How fast the device works, and how long the run will take so; with hours of CPU ahead, the way to a quick one."""
    chars_per_s, gflops = figures["train/chars_per_s"], figures["train/gflops"]
    chars = trainer.config.data.batch_size * trainer.config.data.seq_len
    left = float("inf")
    if trainer.total_steps:
        left = (trainer.total_steps - trainer.progress.step) * chars / chars_per_s
    limit = trainer.config.train.time_limit
    if limit:
        left = min(left, limit - trainer.progress.elapsed_s)
    share = f", {format_share(figures['train/mfu'])} of the peak" if "train/mfu" in figures else ""
    line = (
        f"pace      {chars_per_s:,.0f} characters/s ({gflops:,.0f} GFLOP/s{share}): about {format_duration(left)} to go"
    )
    if trainer.device.type == "cpu" and left > _LONG_ON_CPU_S:
        line += "; for a model in minutes on a CPU leave out --config"
    had, threads = trainer.cpu_share(), torch.get_num_threads()
    if trainer.device.type == "cpu" and threads > 1 and had < UNDISTURBED:
        line += (
            f"; other processes use these cores: {threads} threads had {had:.0%} of their time, and fewer may be "
            f"faster (--set train.threads={threads - 1})"
        )
    return line


def goes_on(run_dir: Path) -> str:
    """From where the same command goes on."""
    saved = step_folders(run_dir)
    origin = f"step {step_of(saved[0]):,}" if saved else "its beginning"
    return f"the same command again goes on from {origin}"


def stopped_line(trainer: "Trainer") -> str:
    """Where a run was stopped, and by what."""
    name = signal.Signals(trainer.stopped_by).name
    return f"stopped by {name} after step {trainer.progress.step:,}; {goes_on(trainer.run_dir)}"


def closing_lines(trainer: "Trainer", best: Checkpoint, model_file: Path, difference: float) -> list[str]:
    """What there is now, and the next command to type."""
    metrics = best.trainer["metrics"]
    size = model_file.stat().st_size / 2**20
    lines = [
        f"done      {trainer.progress.step:,} steps, {trainer.progress.elapsed_s:,.0f} s; best at step {best.step:,}",
    ]
    lines += [
        f"          {name:<8}{metrics[f'val/{name}/loss']:.4f} nats/char  {metrics[f'val/{name}/bpc']:.4f} bits/char"
        for name in ("stream", "windows")
        if f"val/{name}/loss" in metrics
    ]
    lines += baseline_warning(trainer.corpus, metrics)
    prompt = ' -p "ROMEO:"' if not trainer.vocab.unknown_in("ROMEO:") else ""
    return [
        *lines,
        f"files     {trainer.run_dir}{os.sep}: best, config.yaml, metrics.jsonl",
        f"model     {model_file} ({size:.1f} MiB, differs from torch by {difference:.0e} at most)",
        f"next      infer generate -m {shlex.quote(str(model_file))}{prompt}",
    ]


def baseline_warning(corpus: Corpus, metrics: dict[str, float]) -> list[str]:
    """A warning when the trained model predicts the validation split worse than counting n-grams does."""
    loss, nats = metrics.get("val/stream/loss"), corpus.ngram_loss
    if loss is None or nats is None or loss <= nats:
        return []
    return [
        f"warning   stream {loss:.4f} is worse than the baseline of {nats:.4f} nats/char by counting; train longer "
        "(--time-limit, --epochs), start from pretrained weights (--init-from base) or give more text"
    ]


def device_name(device: torch.device) -> str:
    """What the user calls the device: the GPU's product name, or "CPU" with the processor's where torch knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        return f"CPU ({torch.cpu.get_capabilities().get('cpu_name', 'unnamed')})"
    return device.type.upper()
