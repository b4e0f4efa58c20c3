"""Divergence and lack of memory, as errors with the step, the values and the remedy."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from charrnn.config import EvalConfig, RunConfig
from charrnn.errors import TrainingError

# torch's GradScaler begins at 2**16 and halves at each step that it skips; 40 halvings are far below any useful scale.
MOST_SKIPPED = 40
_ALLOCATOR = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "bad_alloc")


def check_finite(
    step: int, lrs: Sequence[float], losses: Sequence[float], norms: Sequence[float] | None, run_dir: Path
) -> None:
    """Check the losses and gradient norms of the latest steps.

    Args:
        step: Number of the latest one, whose values come last.
        lrs: Learning rates.
        losses: Nats/char.
        norms: Gradient norms; None where a loss scaler judges them, which skips the steps whose gradient is not finite.
        run_dir: For the message.

    Raises:
        TrainingError: A loss or norm is not finite.
    """
    first = step - len(losses) + 1
    for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True)):
        norm = norms[i] if norms is not None else 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            shown = f", gradient norm {norm}" if norms is not None else ""
            raise TrainingError(
                f"training diverged at step {first + i}: loss {loss}, learning rate {lr:.3g}{shown}; {_kept(run_dir)}"
            )


def check_skipped(step: int, skipped: int, run_dir: Path) -> None:
    """Check that the loss scaler finds a scale.

    Args:
        step: Number of the latest step.
        skipped: How many in a row up to it were skipped, because their gradient was not finite.
        run_dir: For the message.

    Raises:
        TrainingError: They are too many: each has halved the scale.
    """
    if skipped > MOST_SKIPPED:
        raise TrainingError(
            f"training diverged at step {step}: the gradients of {skipped} steps in a row are not finite at any loss "
            f"scale; {_kept(run_dir)}"
        )


def _kept(run_dir: Path) -> str:
    return (
        f"the last good checkpoint in {run_dir} is kept; lower optim.lr or set optim.grad_clip, and run in another "
        "--run-dir"
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
    return TrainingError(
        f"the device ran out of memory ({_wanted(error)}); lower data.batch_size (now {config.data.batch_size}), "
        f"data.seq_len (now {config.data.seq_len}) or model.hidden_dim (now {config.model.hidden_dim}), or raise "
        f"train.accumulation_steps (now {config.train.accumulation_steps}), which keeps the batch"
    )


def evaluation_out_of_memory(config: EvalConfig, error: str) -> TrainingError:
    """The error for an evaluation that does not fit the device's memory. error: this rank's, "" if another has it."""
    return TrainingError(
        f"the device ran out of memory in an evaluation ({_wanted(error) or 'on another process'}); lower "
        f"eval.batch_rows (now {config.batch_rows}), eval.window (now {config.window}) or eval.stream_lanes (now "
        f"{config.stream_lanes})"
    )


def _wanted(error: str) -> str:
    """The size of the failed allocation, as the allocator reports it."""
    found = re.search(r"tried to allocate [\d.]+ \w+", error, re.IGNORECASE)
    return f"t{found[0][1:]}" if found else error.split(". ")[0]
