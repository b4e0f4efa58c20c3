"""The two ways training itself can fail, as errors that name the step and the remedy."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from charrnn.config import RunConfig
from charrnn.errors import TrainingError

_ALLOCATOR = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "bad_alloc")


def check_finite(
    step: int, lrs: Sequence[float], losses: Sequence[float], norms: Sequence[float] | None, run_dir: Path
) -> None:
    """Raises: TrainingError when a loss or gradient norm of the updates up to number `step` is not finite.

    lrs, losses, norms: one entry an update, the last being `step`'s. norms None: gradients are not judged.
    """
    first = step - len(losses) + 1
    for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True)):
        norm = norms[i] if norms is not None else 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            shown = f", gradient norm {norm}" if norms is not None else ""
            raise TrainingError(
                f"training diverged at step {first + i}: loss {loss}, learning rate {lr:.3g}{shown}; the last good "
                f"checkpoint in {run_dir} is kept; lower optim.lr or set optim.grad_clip, and run in another --run-dir"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: torch's allocator on a CPU raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _ALLOCATOR)


@contextlib.contextmanager
def memory_explained(config: RunConfig) -> Iterator[None]:
    """Raises: TrainingError for a lack of memory in the block, with the settings to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, str(error)) from None
        raise


def out_of_memory(config: RunConfig, error: str) -> TrainingError:
    """The error for a device whose memory is too small, with the settings to lower and their values."""
    found = re.search(r"tried to allocate [\d.]+ \w+", error, re.IGNORECASE)
    wanted = f"t{found[0][1:]}" if found else error.split(". ")[0]
    return TrainingError(
        f"the device ran out of memory ({wanted}); lower data.batch_size (now {config.data.batch_size}), data.seq_len "
        f"(now {config.data.seq_len}) or model.hidden_dim (now {config.model.hidden_dim}), or raise "
        f"train.accumulation_steps (now {config.train.accumulation_steps}), which keeps the batch"
    )
