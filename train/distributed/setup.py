"""The processes and devices the launcher has started: Accelerate's setup, and checks that they fit the config."""

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
from train.distributed.precision import device_type, training_precision

# Fields that may differ between machines.
_LOCAL_FIELDS = {"data.source", "data.cache_dir", "data.mirror", "train.threads", "train.run_dir"}
# The minimum timeout of a collective. It exceeds the watchdog's, which reports the failed rank.
_MIN_COLLECTIVE_TIMEOUT_S = 1800.0


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Set up Accelerate for the processes and devices that the launcher started.

    Raises:
        ConfigError: If the precision is not supported, processes lack a GPU, or Accelerate did not join them.
    """
    check_local_devices()
    if train.deterministic:
        use_deterministic_algorithms()
    precision = training_precision(train.mixed_precision)
    timeout_s = max(_MIN_COLLECTIVE_TIMEOUT_S, 2 * train.peer_timeout)
    report_before_nccl_aborts(timeout_s)
    data_parallel = DistributedDataParallelKwargs(bucket_cap_mb=train.bucket_mb, gradient_as_bucket_view=True)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # Accelerate joins CPU processes only if told to use the CPU; otherwise each would train alone.
            cpu=launched > 1 and not torch.accelerator.is_available(),
            # The trainer divides by train.accumulation_steps itself, whatever the environment's
            # ACCELERATE_GRADIENT_ACCUMULATION_STEPS is.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[data_parallel, InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_s))],
        )
    except ValueError as error:
        raise ConfigError(
            f"precision {precision} is not supported here: {' '.join(str(error).split())}; use bf16 or no"
        ) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 is not supported here: it is slow on a CPU; use bf16, native or no")
    check_joined(launched, accelerator.num_processes)
    return accelerator


def check_local_devices() -> None:
    """Raise a ConfigError if this machine runs more processes than it has GPUs, before CUDA or NCCL fails."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_type() == "cpu" or "ACCELERATE_TORCH_DEVICE" in os.environ:
        return
    devices = torch.accelerator.device_count()
    if processes > devices:
        raise ConfigError(
            f"{processes} processes on this machine, but only {devices} GPU(s); start at most one process per GPU, or "
            "set ACCELERATE_USE_CPU=true"
        )


def use_deterministic_algorithms() -> None:
    """Make equal runs on the same GPU give equal results. Call before the first CUDA operation."""
    # https://docs.pytorch.org/docs/stable/notes/randomness.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, no effect


def report_before_nccl_aborts(timeout_s: float) -> None:
    """Have NCCL raise an error when a peer fails, rather than abort the process before the watchdog reports the rank.

    timeout_s: after which torch's own monitor may abort a process. Variables the user has set are kept.
    """
    # https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html: 2 aborts the communicator only, so
    # that the next collective raises; the default, 3, ends the process with SIGABRT.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout_s)))


def check_joined(launched: int, joined: int) -> None:
    """Raise a ConfigError if Accelerate joined fewer processes than were launched: each would train alone."""
    if launched != joined:
        raise ConfigError(
            f"WORLD_SIZE is {launched}, but Accelerate joined {joined} process(es); start them by torchrun, on CPUs "
            "with ACCELERATE_USE_CPU=true, or unset WORLD_SIZE for a run of one process (docs/distributed.md)"
        )


def compress_gradients(wrapped: nn.Module, kind: str) -> None:
    """Communicate the gradients of a DDP module in `kind` (none, bf16, fp16)."""
    if kind == "none" or not isinstance(wrapped, DistributedDataParallel):
        return
    hook = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}[kind]

    # DDP recognises torch's bf16 hook by its name and refuses it without CUDA, although gloo adds bf16 as well.
    def compressed(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return hook(group, bucket)

    compressed.__name__ = compressed.__qualname__ = f"{kind}_gradients"
    wrapped.register_comm_hook(None, compressed)


def check_same_config(configs: Sequence[dict[str, Any]]) -> None:
    """Check that the configs of all ranks agree.

    Args:
        configs: Each rank's `shared_fields`, in rank order.

    Raises:
        ConfigError: If they differ, with the fields and the rank.
    """
    for rank, theirs in enumerate(configs):
        if differing := [name for name in configs[0] if theirs.get(name) != configs[0][name]]:
            clauses = [f"{n} is {theirs.get(n)!r} there and {configs[0][n]!r} on rank 0" for n in differing]
            raise ConfigError(f"rank {rank} has a different config: {listing(clauses, 5)}; use the same one on all")


def shared_fields(config: RunConfig, precision: str) -> dict[str, Any]:
    """The fields that must be equal on all ranks, "section.key" -> value.

    precision: what Accelerate resolved train.mixed_precision to.
    """
    fields = {
        f"{s}.{k}": value for s, section in config.model_dump(mode="json").items() for k, value in section.items()
    }
    return {n: v for n, v in fields.items() if n not in _LOCAL_FIELDS} | {"train.mixed_precision": precision}


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Raise a ConfigError if their number is not train.processes, or the global batch does not divide by it."""
    wanted = config.train.processes
    if wanted and wanted != num_processes:
        raise ConfigError(
            f"train.processes is {wanted}, but the launcher started {num_processes}; start several CPU processes with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {wanted} train/main.py (docs/distributed.md)"
        )
    batch, steps = config.data.batch_size, config.train.accumulation_steps
    divisor = num_processes * steps
    if batch % divisor:
        below, above = batch // divisor * divisor, -(-batch // divisor) * divisor
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch_size {batch} is not divisible by {num_processes} process(es) x {steps} accumulation step(s); "
            f"set it to {near}"
        )


def set_threads(threads: int) -> int:
    """Set this process's number of CPU threads, and return it.

    `accelerate launch` sets OMP_NUM_THREADS=1 on a machine without a GPU, which would leave the other cores idle.

    Args:
        threads: 0 = all cores, divided by the machine's processes.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = threads or max(1, cores() // local_processes)
    torch.set_num_threads(count)
    return count


def device_name(device: torch.device) -> str:
    """The GPU's product name, or "CPU" with the processor's where torch knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        return f"CPU ({torch.cpu.get_capabilities().get('cpu_name', 'unnamed')})"
    return device.type.upper()
