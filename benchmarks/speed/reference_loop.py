"""The loop that train_speed.py compares with: as one writes it from the textbook, from torch's own parts.

Windows through a Dataset and a DataLoader, embedding, nn.GRU or nn.LSTM from a zero state, linear head, Adam, clipping,
in fp32; a loss read after every step. Letters: B batch_size, T seq_len, V vocabulary size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from charrnn.config import ModelConfig


class SlidingWindows(Dataset[tuple[Tensor, Tensor]]):
    """Every window of T + 1 characters of `ids` (N,), as inputs and targets, each (T,)."""

    def __init__(self, ids: Tensor, seq_len: int) -> None:
        self._ids, self._seq_len = ids, seq_len

    def __len__(self) -> int:
        return len(self._ids) - self._seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self._ids[index : index + self._seq_len + 1]
        return window[:-1], window[1:]


class Network(nn.Module):
    """ids (B, T) to logits (B, T, V)."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        cell = nn.GRU if config.rnn == "GRU" else nn.LSTM
        self.rnn = cell(config.embedding_dim, config.hidden_dim, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.hidden_dim, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        """The network, from a zero state."""
        hidden, _ = self.rnn(self.embedding(ids))
        return self.head(hidden)


def losses(config: ModelConfig, ids: Tensor, vocab_size: int, batch_size: int, seq_len: int) -> Iterator[float]:
    """Trains without end; yields the loss of each update, in nats/char. ids: (N,) int64."""
    loader = DataLoader(SlidingWindows(ids, seq_len), batch_size, shuffle=True, drop_last=True)
    model = Network(config, vocab_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).reshape(-1, vocab_size), y.reshape(-1))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield loss.item()
