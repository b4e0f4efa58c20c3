"""CharRNN: embedding, GRU or LSTM, linear head. Letters: B batch, T seq_len, E, H, L, V as in docs/how-it-works.md."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charrnn.config import ModelConfig
from charrnn.model.gru_cpu import gru_layer, is_faster_on_cpu

State = tuple[Tensor, ...]


class WindowDropout(nn.Module):
    """Dropout with one mask for all characters of a window.

    Source: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
    arXiv 1512.05287.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D). Returns the same shape; each row has one mask, (D,)."""
        if not self.training or not self.p:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)


class CharRNN(nn.Module):
    """A character-level recurrent language model.

    The state is a tuple, `(h,)` for GRU and `(h, c)` for LSTM, each (L, B, H), so that nothing branches on the cell.
    It is an argument and a result, never a buffer of the module: data parallelism would broadcast a buffer.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, document_end: int | None = None) -> None:
        """document_end: id before which the hidden state is reset, so that documents are independent; None = none."""
        super().__init__()
        self.config = config
        self.document_end = document_end
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.dropout = (nn.Dropout if config.dropout_mask == "character" else WindowDropout)(config.dropout)
        cell = nn.GRU if config.rnn == "GRU" else nn.LSTM
        self.rnn = cell(
            config.embedding_dim,
            config.hidden_dim,
            config.num_layers,
            batch_first=True,
            # torch warns of dropout between layers when there is one layer.
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        # Applied to a layer's output, not to its state. Source: Ba, Kiros and Hinton, arXiv 1607.06450.
        norms = config.num_layers if config.layer_norm else 0
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_dim) for _ in range(norms))
        self.head = nn.Linear(config.hidden_dim, vocab_size)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits of the next character at every position.

        ids: (B, T) int64. state: each (L, B, H). Returns logits (B, T, V) and the state after the last character.
        A row's state is zero before each `document_end`, whose logits are those of a document's first character.
        """
        x, matrix = self._read(ids)  # (B, T, I), (G, I)
        if self.document_end is None:
            hidden, state = self._run(x, matrix, state)  # (B, T, H)
        else:
            hidden, state = self._run_documents(x, matrix, state, ids == self.document_end)
        return self.head(self.dropout(hidden)), state  # (B, T, V)

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's input, (B, T, I), and its input weights, (G, I).

        In general embeddings, I = E, and the layer's own weights. On a CPU without dropout, where that takes fewer
        FLOPs: one-hot ids, I = V, and the product of the weights with the embedding matrix.
        """
        matrix = cast(Tensor, self.rnn.weight_ih_l0)
        symbols, width = self.embedding.weight.shape
        dropped = self.training and self.config.dropout > 0
        if dropped or ids.device.type != "cpu" or symbols * width > ids.numel() * (width - symbols):
            return self.dropout(self.embedding(ids)), matrix
        identity = torch.eye(symbols, dtype=matrix.dtype)
        return F.embedding(ids, identity), matrix @ self.embedding.weight.t()

    def _run_documents(self, x: Tensor, matrix: Tensor, state: State, ends: Tensor) -> tuple[Tensor, State]:
        """`_run` in segments that start where some row has a document end. x: (B, T, I), ends: (B, T) bool."""
        at = ends.any(0).nonzero()[:, 0].tolist()  # synchronizes with a GPU, once per window
        pieces = []
        for start, stop in pairwise(sorted({0, *at, x.shape[1]})):
            if start in at:
                state = zeroed(state, ends[:, start])
            hidden, state = self._run(x[:, start:stop], matrix, state)
            pieces.append(hidden)
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else hidden, state

    def runs_layer_by_layer(self, device_type: str, *, training: bool) -> bool:
        """Whether the recurrent layers are called one at a time rather than all in one call.

        LayerNorm and a window's dropout mask lie between two layers. So does, on CUDA, all dropout: cuDNN's has a
        random state of its own, which no checkpoint holds. There evaluation takes the same way, for which the weights
        are laid out (`flatten_parameters`).
        """
        config = self.config
        if config.layer_norm:
            return True
        dropout = config.num_layers > 1 and config.dropout > 0
        return dropout and (device_type == "cuda" or (training and config.dropout_mask == "window"))

    def _run(self, x: Tensor, matrix: Tensor, state: State) -> tuple[Tensor, State]:
        """Run all recurrent layers.

        Args:
            x: Input of the first layer, (B, T, I).
            matrix: Its input weights, (G, I), as `_read` returns them.
            state: Each (L, B, H).

        Returns:
            The last layer's output, (B, T, H), and the state after the last character.
        """
        own_gru = len(state) == 1 and is_faster_on_cpu(x)
        one_call = matrix is self.rnn.weight_ih_l0 and not own_gru
        if one_call and not self.runs_layer_by_layer(x.device.type, training=self.training):
            return self._run_rnn(x, state)
        states = []
        for i in range(self.config.num_layers):
            x, matrix = (self.dropout(x), getattr(self.rnn, f"weight_ih_l{i}")) if i else (x, matrix)
            x, after = self._run_layer(i, x, matrix, tuple(part[i : i + 1] for part in state))
            x = self.norms[i](x) if self.config.layer_norm else x
            states.append(after)
        return x, states[0] if len(states) == 1 else tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    def _run_layer(self, i: int, x: Tensor, matrix: Tensor, state: State) -> tuple[Tensor, State]:
        """Run layer i over x (B, T, I) with its state, each part (1, B, H), before and after."""
        weights = [matrix, *_layer_weights(self.rnn, i)[1:]]
        if len(state) == 1 and is_faster_on_cpu(x):
            hidden, h = gru_layer(x.transpose(0, 1), state[0][0], weights)  # (T, B, H)
            return hidden.transpose(0, 1), (h[None],)
        return self._call_torch(x, state, weights, num_layers=1, dropout=0.0)

    def _run_rnn(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run all layers in one call. x: (B, T, I), state: each (L, B, H)."""
        weights = [w for layer in self.rnn.all_weights for w in layer]
        dropout = self.rnn.dropout if self.training else 0.0
        return self._call_torch(x, state, weights, num_layers=self.config.num_layers, dropout=dropout)

    def _call_torch(
        self, x: Tensor, state: State, weights: Sequence[Tensor], *, num_layers: int, dropout: float
    ) -> tuple[Tensor, State]:
        """torch's function behind nn.GRU and nn.LSTM, with the state as a tuple for both.

        train=True keeps what the backward pass needs: cuDNN refuses a backward pass after a call with train=False; a
        gradient may also be taken in eval mode.
        """
        train = self.training or torch.is_grad_enabled()
        # has_biases, num_layers, dropout, train, bidirectional, batch_first
        rest = (list(weights), True, num_layers, dropout, train, False, True)
        if len(state) == 2:
            hidden, h, c = torch.lstm(x, state, *rest)
            return hidden, (h, c)
        hidden, h = torch.gru(x, state[0], *rest)
        return hidden, (h,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the weights, as every method of nn.Module that does, and lay them out again."""
        super()._apply(fn, recurse)
        self.flatten_parameters()
        return self

    def flatten_parameters(self) -> None:
        """Lay the recurrent weights out as cuDNN takes them: in one block, or in one for each layer that runs alone.

        Weights that are laid out otherwise are copied at every call. Does nothing where cuDNN does not run.
        """
        rnn = self.rnn
        if not torch.backends.cudnn.is_acceptable(rnn.weight_hh_l0):
            return
        if not self.runs_layer_by_layer("cuda", training=True):
            rnn.flatten_parameters()
            return
        mode = torch.backends.cudnn.rnn.get_cudnn_mode(self.config.rnn)
        with torch.no_grad(), torch.cuda.device_of(rnn.weight_hh_l0):
            for i in range(self.config.num_layers):
                weights = _layer_weights(rnn, i)
                width = weights[0].shape[1]
                # 4 weights a layer; hidden size, projection, layers; batch first; not bidirectional.
                torch._cudnn_rnn_flatten_weight(weights, 4, width, mode, self.config.hidden_dim, 0, 1, True, False)

    def zero_state(self, batch_size: int, device: torch.device | None = None) -> State:
        """The state before the first character: zeros, each (L, B, H) float32."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_dim)
        parts = 1 if self.config.rnn == "GRU" else 2
        return tuple(torch.zeros(shape, device=device) for _ in range(parts))

    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())


def _layer_weights(rnn: nn.RNNBase, i: int) -> list[Tensor]:
    """Layer i's (G, I) and (G, H) matrices and its two (G,) biases."""
    return [getattr(rnn, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


class NextCharLoss(nn.Module):
    """Model and loss in one module, which Accelerate wraps; the model itself stays plain fp32."""

    def __init__(self, model: CharRNN, weight: float = 0.0, temperature: float = 1.0) -> None:
        """weight: of the cross-entropy against targets. temperature: of the targets' softmax."""
        super().__init__()
        self.model, self.weight, self.temperature = model, weight, temperature

    def forward(self, window: Tensor, state: State, targets: Tensor | None = None) -> tuple[Tensor, State]:
        """The mean loss, () nats/char, and the state after the window.

        Without targets the loss is the negative log-likelihood. With them it is (1 - weight) times that, plus weight *
        temperature^2 times the cross-entropy of the softmax at `temperature` against them; the square keeps the second
        gradient's scale. Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

        Args:
            window: Ids, (B, T + 1).
            state: Each (L, B, H).
            targets: Probabilities of the next character, (B, T, V).
        """
        logits, state = self.model(window[:, :-1], state)  # (B, T, V)
        logits = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(logits, window[:, 1:].flatten())
        if targets is None:
            return loss, state
        soft = F.cross_entropy(logits.float() / self.temperature, targets.flatten(0, 1).float())
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * soft, state


def zeroed(state: State, rows: Tensor) -> State:
    """The state, each part (L, B, H), with zeros where `rows` (B,) bool is true."""
    return tuple(part.masked_fill(rows[:, None], 0.0) for part in state)


def detach(state: State) -> State:
    """The state detached from its graph: where truncated backpropagation through time truncates."""
    return tuple(part.detach() for part in state)
