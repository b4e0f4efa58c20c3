"""The transformer that contest.py trains beside ours: benchmark only, no part of the product.

A decoder of pre-norm blocks with learned positions, GELU, no biases, and the embedding as the head, in the size and
with the settings published for characters of Shakespeare: https://github.com/karpathy/nanoGPT,
config/train_shakespeare_char.py. It runs uncompiled. Letters: B batch, T characters, C width, V vocabulary size.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.loop.dataloader import IdSource


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
    lr: float = 1e-3
    final_lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    steps: int = 5000
    seed: int = 1337


class Block(nn.Module):
    """Causal self-attention and a feed-forward part of 4 C, each added to its input: (B, T, C) to (B, T, C)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.dropout = shape.heads, shape.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        x = x + self.drop(self.attention_out(self._attend(self.attention_norm(x))))
        return x + self.drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, width)  # (B, T, C)


class Transformer(nn.Module):
    """ids (B, T) to logits (B, T, V), T at most `shape.context`.

    First weights as GPT-2's: normal, 0.02, those that add to the residual stream divided by sqrt(2 layers).
    """

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(vocab_size, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.drop = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the character after each one."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.embedding(ids) + self.positions(places))  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)  # (B, T, V)


class TransformerTraining:
    """Updates of a Transformer on `ids`, in bf16 autocast or fp32."""

    def __init__(self, shape: Shape, recipe: Recipe, vocab_size: int, ids: IdSource, *, bf16: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.ids, self.bf16, self.step_number = recipe, ids, bf16, 0
        self.model = Transformer(shape, vocab_size).to(ids.device)
        weights = list(self.model.parameters())
        matrices, vectors = [p for p in weights if p.dim() > 1], [p for p in weights if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        self._random = np.random.default_rng(recipe.seed)

    def lr(self) -> float:
        """The learning rate of the next update."""
        r, step = self.recipe, self.step_number
        if step < r.warmup_steps:
            return r.lr * (step + 1) / (r.warmup_steps + 1)
        done = min(1.0, (step - r.warmup_steps) / max(1, r.steps - r.warmup_steps))
        return r.final_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (r.lr - r.final_lr)

    def step(self) -> Tensor:
        """One update; returns its loss, (), in nats/char, on the device."""
        length = self.model.shape.context
        starts = self._random.integers(0, len(self.ids) - length, self.recipe.batch_size)  # (B,)
        window = self.ids.windows(starts, length + 1)  # (B, T + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(window[:, :-1])  # (B, T, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return loss.detach()
