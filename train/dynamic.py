"""Dynamic evaluation: the model goes on learning from the text that it is evaluated on, always after predicting it.

Source: Krause, Kahembwe, Murray and Renals, "Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432. Its
figures say how well a model adapts, and are never to be compared with those of a model that stays as it is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from charrnn.model.rnn import CharRNN, NextCharLoss, detach
from train.dataloader import IdSource

Tensors = list[Tensor]


@dataclass(frozen=True)
class DynamicOptions:
    """How the weights move.

    segment: characters between two moves. lr: of a move. decay: how strongly the weights are drawn back to where they
    began. damping: added to the root mean square of the gradients, which each gradient is divided by. statistics:
    segments of the training split that the mean squares are taken over.
    """

    segment: int = 20
    lr: float = 3e-5
    decay: float = 0.003
    damping: float = 1e-5
    statistics: int = 500


def dynamic_loss(model: CharRNN, ids: IdSource, train_ids: IdSource, options: DynamicOptions) -> dict[str, float]:
    """`dynamic/stream/loss` (nats/char) and `dynamic/stream/bpc` of `ids`, read once in order. Changes the weights.

    train_ids: what the size of a gradient is learnt from. The first of `ids` is not predicted.
    """
    model.eval()
    parameters = list(model.parameters())
    squares = mean_squares(model, train_ids, options)
    roots = [square.sqrt() for square in squares]
    mean_root = sum(float(root.sum()) for root in roots) / sum(root.numel() for root in roots)
    pull = [(options.decay * root / max(mean_root, 1e-30)).clamp(max=1.0) for root in roots]
    steps = [options.lr / (root + options.damping) for root in roots]
    start = [p.detach().clone() for p in parameters]
    total, count = 0.0, 0
    for nll, predicted in _segments(model, ids, np.arange(0, len(ids) - 1, options.segment), options.segment):
        total, count = total + nll * predicted, count + predicted
        _move(parameters, steps, pull, start)
    return {"dynamic/stream/loss": total / count, "dynamic/stream/bpc": total / count / math.log(2)}


def mean_squares(model: CharRNN, train_ids: IdSource, options: DynamicOptions) -> Tensors:
    """For each parameter the mean of its gradient's square over segments of the training split, spread evenly."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    whole = (len(train_ids) - 1) // options.segment
    chosen = np.unique(np.linspace(0, max(whole - 1, 0), min(options.statistics, max(whole, 1))).astype(np.int64))
    for _ in _segments(model, train_ids, chosen * options.segment, options.segment):
        for total, p in zip(sums, parameters, strict=True):
            assert p.grad is not None
            total.addcmul_(p.grad, p.grad, value=1 / len(chosen))
    return sums


def _segments(model: CharRNN, ids: IdSource, starts: np.ndarray, length: int) -> Iterator[tuple[float, int]]:
    """Each segment's mean loss in nats and how many characters it predicts; its gradient lies in the parameters.

    The state is carried from one to the next, and no gradient crosses.
    """
    loss_of = NextCharLoss(model)
    state = model.zero_state(1, ids.device)
    for start in starts:
        predicted = min(length, len(ids) - 1 - int(start))
        model.zero_grad()
        loss, after = loss_of(ids.windows(np.array([start]), predicted + 1), state)
        loss.backward()
        state = detach(after)
        yield loss.item(), predicted


@torch.no_grad()
def _move(parameters: list[torch.nn.Parameter], steps: Tensors, pull: Tensors, start: Tensors) -> None:
    """One step against the gradients, each divided by its usual size, and back towards `start`."""
    for p, step, back, origin in zip(parameters, steps, pull, start, strict=True):
        assert p.grad is not None
        p.addcmul_(step, p.grad, value=-1).add_(back * (origin - p))
