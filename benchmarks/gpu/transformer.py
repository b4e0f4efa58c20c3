"""The transformer that trains beside ours: benchmark only, no part of the product.

A decoder of pre-norm blocks with learned positions, GELU, no biases, and the embedding as the head, in the size and
with the settings published for characters of Shakespeare: https://github.com/karpathy/nanoGPT,
config/train_shakespeare_char.py. Letters: B batch, T characters, C width, V vocabulary size.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the network. context: the most characters it reads at once. width divides by heads."""

    layers: int = 6
    heads: int = 6
    width: int = 384
    context: int = 256
    dropout: float = 0.2


@dataclass(frozen=True)
class Recipe:
    """How it is trained: AdamW, linear warm-up, cosine from lr to final_lr at `steps`, windows drawn at random."""

    batch_size: int = 64
    peak_lr: float = 1e-3
    final_lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    steps: int = 5000
    seed: int = 1337

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.final_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (self.peak_lr - self.final_lr)


class Transformer(nn.Module):
    """ids (B, T) to logits (B, T, V), T at most `shape.context`.

    First weights as GPT-2's: normal, 0.02, those that add to the residual stream divided by sqrt(2 layers).
    """

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        width = shape.width
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(shape.context, width)
        self.drop = nn.Dropout(shape.dropout)
        block = nn.TransformerEncoderLayer(
            width, shape.heads, 4 * width, shape.dropout, "gelu", batch_first=True, norm_first=True, bias=False
        )
        block.dropout = nn.Identity()  # type: ignore[assignment]  # GPT-2 drops nothing between the two products
        norm = nn.LayerNorm(width, bias=False)
        self.blocks = nn.TransformerEncoder(block, shape.layers, norm, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(shape.context))
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the character after each one."""
        length = ids.shape[1]
        x = self.drop(self.embedding(ids) + self.positions.weight[:length])  # (B, T, C)
        x = self.blocks(x, self.get_buffer("mask")[:length, :length], is_causal=True)
        return F.linear(x, self.embedding.weight)  # (B, T, V)
