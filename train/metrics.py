"""The figures of updates, kept on the device until a line of the log is due: no update waits for a copy to the host."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from train.errors import check_finite, check_skipped


class Figures:
    """Learning rate, loss and gradient norm of the updates since the last line."""

    def __init__(self, accelerator: Accelerator, run_dir: Path) -> None:
        self._accelerator, self._run_dir = accelerator, run_dir
        self._pending: list[tuple[float, Tensor, Tensor]] = []  # loss and norm on the device
        self._fetched: list[tuple[float, float, float]] = []
        self._skipped = 0  # steps in a row, up to the latest, that the loss scaler has skipped

    def add(self, lr: float, loss: Tensor, norm: Tensor) -> None:
        """An update's figures. loss: this rank's, (). norm: the global gradient's, ()."""
        self._pending.append((lr, loss, norm))

    def fetch(self, step: int) -> None:
        """Brings them to the host, all at once. step: of the latest update.

        Raises: TrainingError on every rank when a loss or norm of any rank is not finite.
        """
        if not self._pending:
            return
        lrs = [lr for lr, _, _ in self._pending]
        figures = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in self._pending])  # (n, 2)
        self._pending.clear()
        if self._accelerator.num_processes > 1:
            figures = self._accelerator.reduce(figures, "mean")
        losses, norms = figures.T.tolist()
        scaled = self._accelerator.scaler is not None
        check_finite(step, lrs, losses, None if scaled else norms, self._run_dir)
        for norm in norms:
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        check_skipped(step, self._skipped, self._run_dir)
        self._fetched += zip(lrs, losses, norms, strict=True)

    def take(self) -> tuple[int, dict[str, float]]:
        """How many updates were fetched since the last call, and what the log says of them."""
        count = len(self._fetched)
        if not count:
            return 0, {}
        lrs, losses, norms = zip(*self._fetched, strict=True)
        self._fetched.clear()
        mean = sum(losses) / count
        figures = {"train/loss": mean, "train/bpc": mean / math.log(2), "train/lr": lrs[-1]}
        # Under fp16 that of the latest step which was made: an infinite one only lowers the loss scale.
        made = [norm for norm in norms if math.isfinite(norm)]
        return count, figures | ({"train/grad_norm": made[-1]} if made else {})
