"""Several models as one: the mean of their probabilities."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from charrnn.model.rnn import CharRNN, State


class Ensemble(nn.Module):
    """Models of any size and cell over one vocabulary, called as a CharRNN is.

    The state is the members' states one after another, a flat tuple.
    """

    def __init__(self, members: Sequence[CharRNN], temperature: float = 1.0) -> None:
        """temperature: divides the members' logits before their softmax."""
        super().__init__()
        self.members, self.temperature = nn.ModuleList(members), temperature

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Logarithm of the members' mean probability of the next character at every position.

        ids: (B, T) int64. state: as `zero_state` lays it out. Returns (B, T, V) and the state after the last character.
        """
        total: Tensor | None = None
        after: list[Tensor] = []
        for member in self._list():
            parts = 1 if member.config.rnn == "GRU" else 2
            logits, own = member(ids, state[:parts])  # (B, T, V)
            state = state[parts:]
            after += own
            log_probs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
        assert total is not None
        return total - math.log(len(self.members)), tuple(after)

    def zero_state(self, batch_size: int, device: torch.device | None = None) -> State:
        """The state before the first character: zeros, each (L, B, H) of its member."""
        return tuple(part for member in self._list() for part in member.zero_state(batch_size, device))

    def _list(self) -> list[CharRNN]:
        return cast("list[CharRNN]", list(self.members))
