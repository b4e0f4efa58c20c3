"""What a run says before its first step, once its speed is known, and at its end."""

import math
import os
import shlex
import signal
from pathlib import Path

import torch
from accelerate import Accelerator

from charrnn.config import RunConfig, TrainConfig
from charrnn.data.corpus import Corpus
from charrnn.data.stats import NGRAM_ORDER, sampled_entropies
from charrnn.errors import listing
from charrnn.windows import SPLITS
from train.checkpoint.format import Checkpoint, step_folders, step_of
from train.checkpoint.resume import StartingPoint
from train.dataloader import IdSource, TrainingData
from train.precision import describe_precision
from train.probe import UNDISTURBED
from train.progress import Progress
from train.tracking.console import format_duration, format_share

_LONG_ON_CPU_S = 3600.0


def opening_lines(
    config: RunConfig,
    data: TrainingData,
    start: StartingPoint,
    accelerator: Accelerator,
    run_dir: Path,
    *,
    num_parameters: int,
    total_steps: int,
) -> list[str]:
    """What is about to happen: device, model, corpus, steps."""
    model, corpus, vocab = config.model, data.corpus, data.vocab
    if start.resumed:
        origin = f"resumed at step {start.resumed.step:,}"
    else:
        origin = "new, from given weights" if start.weights else "new"
    splits = (corpus.train, corpus.val, corpus.test)
    symbols = f"{len(vocab)} {'bytes' if vocab.kind == 'bytes' else 'characters'}"
    parts = ", ".join(f"{name} {len(ids):,}" for name, ids in zip(SPLITS, splits, strict=True))
    threads = torch.get_num_threads()
    windows = f"{config.data.windows} windows of {config.data.seq_len} characters, {config.data.batch_size} a step"
    length = length_line(total_steps, config.train.time_limit)
    return [
        f"run       {run_dir} ({origin})",
        f"device    {device_line(accelerator)}, {accelerator.num_processes} process(es) x {threads} CPU thread(s), "
        f"precision {precision_of(config.train, accelerator)}",
        f"model     {model.rnn} {model.num_layers} x {model.hidden_dim}, embedding {model.embedding_dim}, "
        f"dropout {model.dropout:g}: {num_parameters:,} parameters",
        f"corpus    {corpus.name}: {corpus.num_chars:,} characters ({parts}), vocabulary of {symbols}",
        *new_lines(start),
        *placement_lines(data.train),
        *entropy_lines(corpus),
        f"training  {length}; {windows}, {data.plan.steps_per_epoch:,} steps an epoch",
    ]


def precision_of(train: TrainConfig, accelerator: Accelerator) -> str:
    """The precision, and what was asked for where it differs."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    requested = launched if train.mixed_precision == "auto" else train.mixed_precision
    return describe_precision(requested, accelerator.mixed_precision, accelerator.device.type)


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


def device_line(accelerator: Accelerator) -> str:
    """The device's name, and how many there are in all."""
    name = device_name(accelerator.device)
    return name if accelerator.device.type == "cpu" else f"{accelerator.num_processes} x {name}"


def length_line(total_steps: int, time_limit_s: float) -> str:
    """How long the run is: steps, time, or whichever comes first; 0 = no such limit."""
    steps = f"{total_steps:,} steps" if total_steps else ""
    clock = format_duration(time_limit_s) if time_limit_s else ""
    return f"{steps} or {clock}, whichever ends first" if steps and clock else steps or clock


def pace_line(values: dict[str, float], left_s: float, device_type: str, cpu_share: float) -> str:
    """How fast the device works, and how long the run will take so; with hours of CPU ahead, the way to a quick one.

    Args:
        values: The first record's.
        left_s: Seconds to go at that speed.
        device_type: Of the training device.
        cpu_share: Share of its threads' time that this process has had.
    """
    share = f", {format_share(values['train/mfu'])} of the peak" if "train/mfu" in values else ""
    line = (
        f"pace      {values['train/chars_per_s']:,.0f} characters/s ({values['train/gflops']:,.0f} GFLOP/s{share}): "
        f"about {format_duration(left_s)} to go"
    )
    if device_type != "cpu":
        return line
    if left_s > _LONG_ON_CPU_S:
        line += "; for a model in minutes on a CPU leave out --config"
    threads = torch.get_num_threads()
    if threads > 1 and cpu_share < UNDISTURBED:
        line += (
            f"; other processes use these cores: {threads} threads had {cpu_share:.0%} of their time, and fewer may be "
            f"faster (--set train.threads={threads - 1})"
        )
    return line


def noise_line(windows: float, batch_size: int) -> str:
    """Up to which batch size more devices would have helped. windows: the gradient noise scale."""
    scale = max(1, round(windows))
    verdict = (
        f"a batch of more than {scale:,} brings little: more devices would not have helped"
        if batch_size >= scale
        else f"more devices would have helped up to a batch of about {scale:,}"
    )
    return f"scale     gradient noise scale {scale:,} windows, batch_size {batch_size:,}: {verdict}"


def goes_on(run_dir: Path) -> str:
    """From where the same command goes on."""
    saved = step_folders(run_dir)
    origin = f"step {step_of(saved[0]):,}" if saved else "its beginning"
    return f"the same command again goes on from {origin}"


def stopped_line(number: int, step: int, run_dir: Path) -> str:
    """Where a run was stopped, and by what signal."""
    return f"stopped by {signal.Signals(number).name} after step {step:,}; {goes_on(run_dir)}"


def closing_lines(
    data: TrainingData, progress: Progress, best: Checkpoint, run_dir: Path, model_file: Path, difference: float
) -> list[str]:
    """What there is now, and the next command to type.

    Args:
        data: The corpus and the model's vocabulary.
        progress: At the run's end.
        best: The exported checkpoint.
        run_dir: The run folder.
        model_file: The exported file.
        difference: Largest difference between its logits and torch's.
    """
    metrics = best.trainer["metrics"]
    size = model_file.stat().st_size / 2**20
    lines = [
        f"done      {progress.step:,} steps, {progress.elapsed_s:,.0f} s; best at step {best.step:,}",
    ]
    lines += [
        f"          {name:<8}{metrics[f'val/{name}/loss']:.4f} nats/char  {metrics[f'val/{name}/bpc']:.4f} bits/char"
        for name in ("stream", "windows")
        if f"val/{name}/loss" in metrics
    ]
    if "train/noise_scale" in metrics:
        lines.append(noise_line(metrics["train/noise_scale"], best.config.data.batch_size))
    lines += baseline_warning(data.corpus, metrics)
    prompt = ' -p "ROMEO:"' if not data.vocab.unknown_in("ROMEO:") else ""
    return [
        *lines,
        f"files     {run_dir}{os.sep}: best, config.yaml, metrics.jsonl",
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
