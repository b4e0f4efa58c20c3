"""What a run prints before its first step, once its speed is known, and at its end."""

import math
import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path

import torch

from charrnn.config import RunConfig
from charrnn.data.corpus import Corpus
from charrnn.data.stats import NGRAM_ORDER, sampled_entropies
from charrnn.errors import listing
from charrnn.vocab import Vocab
from charrnn.windows import SPLITS
from train.checkpoint.format import Checkpoint, step_folders, step_of
from train.checkpoint.resume import StartingPoint
from train.dataloader import IdSource
from train.distributed.setup import device_name
from train.precision import describe_precision
from train.probe import UNDISTURBED
from train.tracking.console import format_duration, format_share

_LONG_ON_CPU_S = 3600.0


def opening_lines(
    config: RunConfig,
    corpus: Corpus,
    start: StartingPoint,
    run_dir: Path,
    *,
    device: str,
    num_parameters: int,
    total_steps: int,
    steps_per_epoch: int,
) -> list[str]:
    """Device, model, corpus and length of the run.

    Args:
        config: The resolved config.
        corpus: Its text.
        start: Where the run starts.
        run_dir: Its folder.
        device: `describe_device`.
        num_parameters: Of the model.
        total_steps: 0 if only time limits the run.
        steps_per_epoch: Steps of a pass over the training split.
    """
    data, model, vocab = config.data, config.model, start.vocab
    if start.resumed:
        origin = f"resumed at step {start.resumed.step:,}"
    else:
        origin = "new, from given weights" if start.weights else "new"
    splits = zip(SPLITS, (corpus.train, corpus.val, corpus.test), strict=True)
    return [
        f"run       {run_dir} ({origin})",
        f"device    {device}",
        f"model     {model.rnn} {model.num_layers} x {model.hidden_dim}, embedding {model.embedding_dim}, "
        f"dropout {model.dropout:g}: {num_parameters:,} parameters",
        f"corpus    {corpus.name}: {corpus.num_chars:,} characters "
        f"({', '.join(f'{name} {len(ids):,}' for name, ids in splits)}), "
        f"vocabulary of {len(vocab)} {'bytes' if vocab.kind == 'bytes' else 'characters'}",
        *new_lines(start),
        f"training  {_length(total_steps, config.train.time_limit)}; {data.windows} windows of {data.seq_len} "
        f"characters, {data.batch_size} a step, {steps_per_epoch:,} steps an epoch",
    ]


def describe_device(config: RunConfig, device: torch.device, num_processes: int, precision: str) -> str:
    """The devices, processes, threads and precision of a run. precision: what Accelerate computes in."""
    name = device_name(device) if device.type == "cpu" else f"{num_processes} x {device_name(device)}"
    requested = config.train.mixed_precision
    if requested == "auto":
        requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # type: ignore[assignment]
    return (
        f"{name}, {num_processes} process(es) x {torch.get_num_threads()} CPU thread(s), "
        f"precision {describe_precision(requested, precision, device.type)}"
    )


def new_lines(start: StartingPoint) -> list[str]:
    """The characters that the given weights lack."""
    if not start.new:
        return []
    names = listing([repr(c) for c in start.new], 20)
    what = f"{len(start.new)} character(s) that the given weights lack start from their plain forms or the mean"
    return [f"new       {what}: {names}"]


def placement_lines(ids: IdSource) -> list[str]:
    """A line if the training split does not fit on the GPU."""
    if ids.is_resident or ids.device.type == "cpu":
        return []
    return [
        f"ids       the training split of {len(ids):,} characters would take more than half of the GPU's free memory, "
        "and is read from the host"
    ]


def entropy_lines(corpus: Corpus) -> list[str]:
    """What to compare the loss with: the text's entropies and an n-gram model's loss, which takes a second."""
    lines = [f"entropy   {sampled_entropies(corpus.train, len(corpus.vocab)).line()}"]
    if (nats := corpus.ngram_loss) is not None:
        lines.append(
            f"baseline  {nats:.4f} nats/char, {nats / math.log(2):.4f} bits/char on the validation split "
            f"(interpolated Kneser-Ney {NGRAM_ORDER}-grams)"
        )
    return lines


def _length(total_steps: int, time_limit_s: float) -> str:
    steps = f"{total_steps:,} steps" if total_steps else ""
    clock = format_duration(time_limit_s) if time_limit_s else ""
    return f"{steps} or {clock}, whichever ends first" if steps and clock else steps or clock


def pace_line(
    metrics: Mapping[str, float], steps_left: float, time_left_s: float, chars_per_step: int, cpu_share: float | None
) -> str:
    """The training speed and the time left.

    Args:
        metrics: The first record of training.
        steps_left: Steps to the end of the run; inf if only time limits it.
        time_left_s: Seconds to the time limit; inf without one.
        chars_per_step: Characters of a global batch.
        cpu_share: Share of its threads' time that the process had on the cores; None on a GPU.
    """
    chars_per_s, gflops = metrics["train/chars_per_s"], metrics["train/gflops"]
    left_s = min(steps_left * chars_per_step / chars_per_s, time_left_s)
    share = f", {format_share(metrics['train/mfu'])} of the peak" if "train/mfu" in metrics else ""
    speed = f"{chars_per_s:,.0f} characters/s ({gflops:,.0f} GFLOP/s{share})"
    line = f"pace      {speed}: about {format_duration(left_s)} left"
    if cpu_share is None:
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


def resume_hint(run_dir: Path) -> str:
    """How to resume the run, and from which step."""
    saved = step_folders(run_dir)
    return f"rerun the same command to {f'resume from step {step_of(saved[0]):,}' if saved else 'start over'}"


def stopped_line(signal_number: int, step: int, run_dir: Path) -> str:
    """Why and where a run was stopped."""
    return f"stopped by {signal.Signals(signal_number).name} after step {step:,}; {resume_hint(run_dir)}"


def closing_lines(
    best: Checkpoint, model_file: Path, max_difference: float, *, step: int, elapsed_s: float, baseline: float | None
) -> list[str]:
    """Results, files and the next command.

    Args:
        best: The exported checkpoint.
        model_file: The file written from it.
        max_difference: Largest difference between its logits and torch's.
        step: Steps of the run.
        elapsed_s: Its seconds.
        baseline: Loss of an n-gram model in nats/char, None without a validation split.
    """
    metrics, run_dir = best.trainer["metrics"], model_file.parent
    return [
        f"done      {step:,} steps, {elapsed_s:,.0f} s; best at step {best.step:,}",
        *(
            f"          {name:<8}{loss:.4f} nats/char  {metrics[f'val/{name}/bpc']:.4f} bits/char"
            for name in ("stream", "windows")
            if (loss := metrics.get(f"val/{name}/loss")) is not None
        ),
        *baseline_warning(metrics.get("val/stream/loss"), baseline),
        f"files     {run_dir}{os.sep}: best, config.yaml, metrics.jsonl",
        f"model     {model_file} ({model_file.stat().st_size / 2**20:.1f} MiB, differs from torch by "
        f"{max_difference:.0e} at most)",
        f"next      infer generate -m {shlex.quote(str(model_file))}{_prompt_option(best.vocab)}",
    ]


def _prompt_option(vocab: Vocab) -> str:
    return ' -p "ROMEO:"' if not vocab.unknown_in("ROMEO:") else ""


def baseline_warning(loss: float | None, baseline: float | None) -> list[str]:
    """A warning if the trained model's `stream` loss is above the n-gram baseline; both in nats/char."""
    if loss is None or baseline is None or loss <= baseline:
        return []
    return [
        f"warning   stream {loss:.4f} is worse than the n-gram baseline of {baseline:.4f} nats/char; train longer "
        "(--time-limit, --epochs), start from pretrained weights (--init-from base) or add text"
    ]
