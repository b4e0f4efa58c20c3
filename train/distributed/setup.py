"""The processes and devices that a launcher has given the run, and what each of them may use."""

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from charrnn.config import RunConfig, TrainConfig
from charrnn.cores import cores
from charrnn.errors import ConfigError, listing
from train.precision import training_precision

_OF_A_MACHINE = {"data.source", "data.cache_dir", "data.mirror", "train.threads", "train.run_dir"}
# The time-out of a collective, which the watchdog's is to come before: that one can name the rank.
_SHORTEST_COLLECTIVE_TIMEOUT_S = 1800.0


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Accelerate's view of the processes and devices that the launcher started. Raises: ConfigError."""
    precision = training_precision(train.mixed_precision)
    timeout = datetime.timedelta(seconds=max(_SHORTEST_COLLECTIVE_TIMEOUT_S, 2 * train.peer_timeout))
    data_parallel = DistributedDataParallelKwargs(bucket_cap_mb=train.bucket_mb, gradient_as_bucket_view=True)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # Accelerate joins processes on CPUs only where it is told so, and else lets each train alone.
            cpu=launched > 1 and not torch.accelerator.is_available(),
            # The trainer divides by train.accumulation_steps itself, whatever the environment's
            # ACCELERATE_GRADIENT_ACCUMULATION_STEPS says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[data_parallel, InitProcessGroupKwargs(timeout=timeout)],
        )
    except ValueError as error:
        raise ConfigError(
            f"precision {precision} does not work here: {' '.join(str(error).split())}; use bf16 or no"
        ) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 does not work here: a CPU computes it slowly; use bf16, native or no")
    check_joined(launched, accelerator.num_processes)
    return accelerator


def check_joined(launched: int, joined: int) -> None:
    """Raises: ConfigError when Accelerate joined fewer processes than were launched: each would train alone."""
    if launched != joined:
        raise ConfigError(
            f"WORLD_SIZE is {launched}, but Accelerate joined {joined} process(es); start them by torchrun, on CPUs "
            "with ACCELERATE_USE_CPU=true, or unset WORLD_SIZE for a run of one process (docs/launch.md)"
        )


def compress_gradients(wrapped: nn.Module, kind: str) -> None:
    """Has gradients cross between processes as `kind` (bf16, fp16), when there are several; none = as they are."""
    if kind == "none" or not isinstance(wrapped, DistributedDataParallel):
        return
    hook = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}[kind]

    # DDP knows torch's bf16 hook by its name and refuses it without CUDA, although gloo adds bf16 as well.
    def compressed(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return hook(group, bucket)

    compressed.__name__ = compressed.__qualname__ = f"{kind}_gradients"
    wrapped.register_comm_hook(None, compressed)


def check_same_config(everyone: Sequence[dict[str, Any]]) -> None:
    """everyone: each rank's `comparable` config. Raises: ConfigError that names fields and rank where they differ."""
    for rank, theirs in enumerate(everyone):
        if differing := [name for name in everyone[0] if theirs.get(name) != everyone[0][name]]:
            clauses = [f"{n} is {theirs.get(n)!r} there and {everyone[0][n]!r} in process 0" for n in differing]
            raise ConfigError(f"process {rank} has another config: {listing(clauses, 5)}; start all with the same one")


def comparable(config: RunConfig, precision: str) -> dict[str, Any]:
    """The fields of a config that must be alike on all ranks, "section.key" -> value; paths and threads need not be.

    precision: what Accelerate computes in, which `native` and the environment decide.
    """
    fields = {
        f"{s}.{k}": value for s, section in config.model_dump(mode="json").items() for k, value in section.items()
    }
    return {n: v for n, v in fields.items() if n not in _OF_A_MACHINE} | {"train.mixed_precision": precision}


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Raises: ConfigError when they are not as many as wanted, or the global batch can't be shared out evenly."""
    wanted = config.train.processes
    if wanted and wanted != num_processes:
        raise ConfigError(
            f"train.processes is {wanted}, and the launcher started {num_processes}; several CPU processes are started "
            f"by ACCELERATE_USE_CPU=true torchrun --nproc_per_node {wanted} train/main.py (docs/launch.md)"
        )
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
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = threads or max(1, cores() // local_processes)
    torch.set_num_threads(count)
    return count
