"""A run from its config to its model file: processes, corpus, starting point, training, export, closing words."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from charrnn.checkpoint import BEST, load_for_inference
from charrnn.config import RunConfig, dump_config
from charrnn.corpus import prepare
from charrnn.errors import CheckpointError, ConfigError, RunStoppedError
from train.batches import window_plan
from train.export import export_checkpoint
from train.recorder import Recorder
from train.report import closing_lines, interrupted_line, opening_lines
from train.resume import identity_fields, starting_point
from train.trainer import Trainer

_CUDNN_BF16_RNN = 91300


def run(config: RunConfig, *, config_name: str, resume: bool, init_from: Path | None) -> Path | None:
    """Trains, exports and reports. Returns the model file on the main process, None on others.

    Raises: CharRNNError for everything that is the user's to mend.
    """
    accelerator = make_accelerator(config)
    check_divides(config, accelerator.num_processes)
    threads = set_threads(config.train.threads)
    with accelerator.local_main_process_first():
        corpus = prepare(config.data, progress=accelerator.is_main_process)
    window_plan(config, len(corpus.train))  # refuses a text that is too small before a run folder is made
    run_dir = Path(config.train.run_dir or Path("checkpoints") / f"{config_name}-{corpus.name}")

    def warn(text: str) -> None:
        if accelerator.is_main_process:
            print(f"warning: {text}", file=sys.stderr)

    start = starting_point(config, corpus, run_dir, resume=resume, init_from=init_from, warn=warn)
    recorder = Recorder.null()
    if accelerator.is_main_process:
        write_run_config(config, run_dir)
        extra = {"corpus": identity_fields(corpus), "processes": accelerator.num_processes}
        recorder = Recorder.open(config, run_dir, extra, resumed_step=start.resumed.step if start.resumed else 0)
    try:
        trainer = Trainer(config, corpus, start, accelerator, run_dir, recorder)
        recorder.lines(opening_lines(trainer, threads, start))
        p = trainer.progress
        with recorder.display(p.step, p.elapsed_s, trainer.total_steps, trainer.plan.steps_per_epoch):
            try:
                trainer.fit()
            except KeyboardInterrupt:
                raise RunStoppedError(interrupted_line(trainer)) from None
        model_file = finish(trainer, recorder) if accelerator.is_main_process else None
    finally:
        recorder.close()
    accelerator.wait_for_everyone()  # rank 0 has been exporting
    accelerator.end_training()
    return model_file


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's view of the processes and devices that the launcher started. Raises: ConfigError."""
    precision: str | None = config.train.mixed_precision
    if precision == "auto":
        precision = None
    elif precision == "native":
        precision = "bf16" if computes_bf16() else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=precision, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        )
    except ValueError as error:
        wanted = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        raise ConfigError(
            f"precision {wanted} does not work here: {' '.join(str(error).split())}; use bf16 or no"
        ) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 does not work here: a CPU computes it slowly; use bf16, native or no")
    return accelerator


def computes_bf16() -> bool:
    """Whether the training device multiplies bf16 in hardware, in its recurrent kernels too.

    cuDNN's take bf16 from version 9.13 on; oneDNN's gain from it on a CPU with AVX512-BF16 or AMX.
    """
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true", "yes"):
        new_enough = (torch.backends.cudnn.version() or 0) >= _CUDNN_BF16_RNN
        return new_enough and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_divides(config: RunConfig, num_processes: int) -> None:
    """Raises: ConfigError when the global batch can't be shared out evenly."""
    batch, parts = config.data.batch_size, config.train.accumulation_steps
    share = num_processes * parts
    if batch % share:
        below, above = batch // share * share, -(-batch // share) * share
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch_size {batch} does not divide by {num_processes} process(es) x {parts} accumulation step(s); "
            f"set it to {near}"
        )


def set_threads(threads: int) -> int:
    """Sets this process's CPU threads and returns the count; 0 = all cores, shared by the machine's processes.

    `accelerate launch` sets OMP_NUM_THREADS=1 on a machine without a GPU, which would leave the other cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = threads or max(1, cores // local_processes)
    torch.set_num_threads(count)
    return count


def write_run_config(config: RunConfig, run_dir: Path) -> None:
    """The resolved config as RUN/config.yaml. Raises: CheckpointError when the folder can't be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to run folder {run_dir}: {error.strerror}; choose another --run-dir"
        ) from None


def finish(trainer: Trainer, recorder: Recorder) -> Path:
    """Exports the best checkpoint and says what there is now, and what to type next."""
    best = load_for_inference(trainer.run_dir / BEST)
    model_file = trainer.run_dir / "model.onnx"
    difference = export_checkpoint(best, model_file)
    tracker_lines = recorder.finish(best.trainer["metrics"], model_file)
    recorder.lines(closing_lines(trainer, best, model_file, difference) + tracker_lines)
    return model_file
