"""Dynamic evaluation: the model goes on learning from the text that it is evaluated on, always after predicting it.

`python -m benchmarks.quality.dynamic RUN|CHECKPOINT [--split test]`

Source: Krause, Kahembwe, Murray and Renals, "Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432. Its
losses say how well a model adapts, and are never to be compared with those of a model that stays as it is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator
from torch import Tensor

from benchmarks.common import run
from charrnn.model.rnn import CharRNN, NextCharLoss, detach
from train.checkpoint.format import load_for_inference, model_of
from train.evaluate import Part, open_text
from train.given_text import GivenText
from train.loop.dataloader import IdSource

Tensors = list[Tensor]


@dataclass(frozen=True)
class DynamicOptions:
    """How the weights are updated.

    Attributes:
        segment: Characters between two updates.
        lr: Learning rate of an update.
        decay: Pull back to the weights of the start, 0 = none.
        damping: Added to the root mean square of the gradients, which each gradient is divided by.
        statistics: Segments of the training split that the mean squares are taken over.
    """

    segment: int = 20
    lr: float = 3e-5
    decay: float = 0.003
    damping: float = 1e-5
    statistics: int = 500


def dynamic_loss(model: CharRNN, ids: IdSource, train_ids: IdSource, options: DynamicOptions) -> dict[str, float]:
    """Evaluate a model that learns from what it has read. Changes its weights.

    Args:
        model: Where the ids are.
        ids: Read once, in order; the first is not predicted.
        train_ids: What the size of a gradient is estimated from.
        options: How the weights are updated.

    Returns:
        `dynamic/stream/loss` (nats/char) and `dynamic/stream/bpc`.
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
    count = (len(train_ids) - 1) // options.segment
    chosen = np.unique(np.linspace(0, max(count - 1, 0), min(options.statistics, max(count, 1))).astype(np.int64))
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


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its best/) or a checkpoint.")],
    split: Annotated[Part, typer.Option(help="Part of the run's own text.")] = "val",
    segment: Annotated[int, typer.Option(min=1, help="Characters between two updates.")] = DynamicOptions.segment,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of an update.")] = DynamicOptions.lr,
    decay: Annotated[float, typer.Option(min=0.0, help="Pull back to the initial weights.")] = DynamicOptions.decay,
) -> None:
    """Loss of a checkpoint that goes on learning from what it has predicted."""
    device = Accelerator().device
    checkpoint = load_for_inference(source)
    corpus, table = open_text(checkpoint, str(source), GivenText(), "")
    model, ids = model_of(checkpoint).to(device), IdSource(getattr(corpus, split), device, table)
    train_ids = IdSource(corpus.train, device, table)
    losses = dynamic_loss(model, ids, train_ids, DynamicOptions(segment, lr, decay))
    loss, bits = losses.values()
    typer.echo(f"dynamic/stream   {loss:.4f} nats/char  {bits:.4f} bits/char")


if __name__ == "__main__":
    run(command)
