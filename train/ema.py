"""An exponential moving average of the weights, evaluated beside the raw ones."""

import contextlib
from collections.abc import Iterator

import torch

from charrnn.checkpoint import Tensors
from charrnn.model import CharRNN


class AveragedWeights:
    """Averages the weights after every update (Polyak and Juditsky, 1992; with decay, as in Adam's own moments)."""

    def __init__(self, model: CharRNN, decay: float) -> None:
        """decay: share of the average that stays at an update; 0 = nothing is kept."""
        self.decay = decay
        self._parameters = dict(model.named_parameters()) if decay else {}
        self.tensors: Tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Called after update number `step`, from 1. Early on the average forgets faster."""
        if self._parameters:
            decay = min(self.decay, step / (step + 10))
            torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            raw = parameter.clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(raw)
