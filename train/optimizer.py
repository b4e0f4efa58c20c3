"""AdamW, and the learning rate as a pure function: no scheduler object, so nothing steps it twice."""

import math

import torch

from charrnn.config import OptimConfig
from charrnn.model import CharRNN


def lr_at(step: int, optim: OptimConfig, progress: float) -> float:
    """The learning rate of update number `step` (from 0).

    progress: share of the run after the warm-up that lies behind, 0 to 1; by steps, or by time under a time limit.
    Source of the cosine: Loshchilov and Hutter, "SGDR", arXiv 1608.03983.
    """
    # 1. Linear warm-up, which reaches lr with update number warmup_steps.
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    # 2. No decay.
    if optim.schedule == "constant":
        return optim.lr
    # 3. Decay from lr to lr * final_lr.
    progress = min(1.0, progress)
    shape = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.final_lr + (1.0 - optim.final_lr) * shape)


def make_optimizer(model: CharRNN, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that decays matrices and leaves biases alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.muon:
        inside = {id(p) for name, p in model.rnn.named_parameters() if name.startswith("weight")}
        moved = [p for p in matrices if id(p) in inside]
        groups = [
            {"params": moved, "weight_decay": config.weight_decay, "muon": True},
            {"params": [p for p in matrices if id(p) not in inside], "weight_decay": config.weight_decay},
            groups[1],
        ]
        return MuonAndAdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW, and for groups marked `muon` orthogonalised momentum, gate by gate.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled to AdamW's usual
    root mean square as in Liu et al., arXiv 2502.16982.
    """

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        """One update."""
        for group in self.param_groups:
            for p in group["params"] if group.get("muon") else ():
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - 0.95)
                u = p.grad.lerp(buffer, 0.95)
                gates = u.shape[0] // (3 if u.shape[0] % 4 else 4)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for part, gate in zip(u.split(gates), p.split(gates), strict=True):
                    gate.add_(orthogonal(part), alpha=-group["lr"] * 0.2 * max(part.shape) ** 0.5)
                p.grad = None
        return super().step(closure)


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """The nearest half-orthogonal matrix, roughly: five Newton-Schulz steps in bf16."""
    x = g.bfloat16()
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)
