"""The two ways training itself can fail, as errors that name the step and the remedy."""

import math
from collections.abc import Sequence
from pathlib import Path

from charrnn.config import RunConfig
from charrnn.errors import TrainingError


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


def out_of_memory(config: RunConfig, error: str) -> TrainingError:
    """The error for a device whose memory is too small, with the settings to lower and their values."""
    wanted = error.split(". ")[0]
    return TrainingError(
        f"the device ran out of memory ({wanted}); lower data.batch_size (now {config.data.batch_size}), data.seq_len "
        f"(now {config.data.seq_len}) or model.hidden_dim (now {config.model.hidden_dim}), or raise "
        f"train.accumulation_steps (now {config.train.accumulation_steps}), which keeps the batch"
    )
