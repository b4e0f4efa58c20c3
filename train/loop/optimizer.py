"""AdamW, and the learning rate as a pure function: no scheduler object, so nothing steps it twice."""

import math

import torch

from charrnn.config import OptimConfig, RunConfig
from charrnn.model.rnn import CharRNN


def lr_at(step: int, optim: OptimConfig, progress: float) -> float:
    """The learning rate of a step. Source of the cosine: Loshchilov and Hutter, "SGDR", arXiv 1608.03983.

    Args:
        step: Its number, from 0.
        optim: Peak rate and schedule.
        progress: Completed fraction of the run after the warm-up, 0 to 1, by steps or by time.
    """
    # 1. Linear warm-up, which reaches lr with step number warmup_steps.
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    # 2. No decay.
    if optim.schedule == "constant":
        return optim.lr
    # 3. Decay from lr to lr * final_lr.
    progress = min(1.0, progress)
    shape = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.final_lr + (1.0 - optim.final_lr) * shape)


def lr_factor(config: RunConfig) -> float:
    """The factor of `train.lr_scaling` for a batch k times the one that optim.lr is meant for.

    sqrt is LEGW (You et al., arXiv 1901.08256), whose warm-up lasts k times as many epochs: warmup_steps counts steps
    of k times the characters, so it does. linear is Goyal et al., arXiv 1706.02677.
    """
    scaling, reference = config.train.lr_scaling, config.train.lr_batch_size
    if scaling == "none":
        return 1.0
    k = config.data.batch_size / reference
    return k if scaling == "linear" else math.sqrt(k)


def make_optimizer(model: CharRNN, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with weight decay on matrices, not on vectors."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
