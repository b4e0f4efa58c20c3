"""Local SGD: the ranks update their weights alone and average them now and then, which slow networks bear better."""

from types import TracebackType

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import nn

from charrnn.model import CharRNN


class LocalUpdates:
    """Accelerate's LocalSGD (Stich, "Local SGD Converges Fast and Communicates Little", arXiv 1805.09767).

    Between two averages the ranks' weights differ, and so do the optimizer's moments. `settle` makes them one, as an
    evaluation and a checkpoint need. With `every` 0, or one process, gradients are exchanged as always.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        wrapped: nn.Module,
        model: CharRNN,
        optimizer: torch.optim.Optimizer,
        every: int,
    ) -> None:
        """wrapped: the module that exchanges gradients. every: updates between two averages."""
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self._enabled = every > 0 and accelerator.num_processes > 1
        self._local = LocalSGD(accelerator, wrapped, every, enabled=self._enabled)

    def __enter__(self) -> "LocalUpdates":
        self._local.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error the ranks may be out of step: nothing to average then.
        if error is None:
            self._local.__exit__(kind, error, traceback)

    def step(self, step: int) -> None:
        """Called after update number `step`, from 1; averages the weights when it is their turn."""
        self._local.num_steps = step - 1  # counted from the run's beginning, not from this segment's
        self._local.step()
        if self._enabled and step % self._local.local_sgd_steps == 0:
            self._model.rnn.flatten_parameters()

    def settle(self) -> None:
        """Averages weights and moments now, on every rank."""
        if not self._enabled:
            return
        self._local.__exit__(None, None, None)
        for state in self._optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(self._accelerator.reduce(state[name], "mean"))
        self._model.rnn.flatten_parameters()
        self._local.__enter__()
