"""What resetting the state at documents' ends costs: a training step on documents of several mean lengths.

    python -m benchmarks.speed.documents [--rounds 5]

A step is forward and backward of a batch of random characters. Ends are drawn at random, so that rows have them at
different places; the window is run in as many pieces as there are places. Medians (quartiles) over rounds in turn.
"""

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer

from benchmarks.common import in_turns, machine_line, markdown, markdown_head, quartiles, run, seconds_of
from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN, NextCharLoss

SYMBOLS = 65
MEAN_CHARS = (0, 100_000, 10_000, 1_000, 100)  # 0: the network knows of no documents
COLUMNS = ("cell", "characters a document", "pieces a window", "ms a step", "of the plain step")


def window_of(mean_chars: int, seed: int, batch_size: int, seq_len: int) -> torch.Tensor:
    """Draws (B, T + 1) ids; id 0 ends a document, one character in `mean_chars`, and does not occur for 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SYMBOLS, (batch_size, seq_len + 1), generator=generator)
    if mean_chars:
        ids[torch.rand(ids.shape, generator=generator) < 1 / mean_chars] = 0
    return ids


def step(loss: NextCharLoss, window: torch.Tensor) -> None:
    """Runs one forward and backward pass. window: (B, T + 1) ids."""
    value, _ = loss(window, loss.model.zero_state(len(window)))
    value.backward()
    loss.zero_grad()


def sides(rnn: str, hidden_dim: int, batch_size: int, seq_len: int) -> dict[str, Callable[[], tuple[float, int]]]:
    """Returns, for each mean length, what draws the next window and times a step: (pieces, seconds)."""
    shape = ModelConfig.model_validate({"rnn": rnn, "hidden_dim": hidden_dim})
    plain, marked = (NextCharLoss(CharRNN(shape, SYMBOLS, end)) for end in (None, 0))

    def measure(mean_chars: int, seeds: "itertools.count[int]") -> tuple[float, int]:
        window = window_of(mean_chars, next(seeds), batch_size, seq_len)
        pieces = 1 + int((window[:, 1:-1] == 0).any(0).sum())
        return seconds_of(lambda: step(marked if mean_chars else plain, window)), pieces

    return {str(mean or "no documents"): partial(measure, mean, itertools.count()) for mean in MEAN_CHARS}


def documents(
    hidden_dim: Annotated[int, typer.Option(help="H, of 2 layers.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="B.", min=1)] = 64,
    seq_len: Annotated[int, typer.Option(help="T.", min=2)] = 128,
    rounds: Annotated[int, typer.Option(help="Times that each step is measured.", min=2)] = 5,
) -> None:
    """Print the cost of documents' ends."""
    print(machine_line())
    print(f"size     2 x {hidden_dim}, {batch_size} x {seq_len} characters a step, {torch.get_num_threads()} threads\n")
    print("\n".join(markdown_head(COLUMNS, numbers=4)))
    for rnn in ("GRU", "LSTM"):
        base = 0.0
        for name, taken in in_turns(sides(rnn, hidden_dim, batch_size, seq_len), rounds, warmup=1).items():
            seconds = quartiles([s for s, _ in taken])
            base = base or seconds.median
            pieces = statistics.fmean(p for _, p in taken)
            print(markdown([rnn, name, f"{pieces:.1f}", seconds.show(".0f", 1e3), f"{seconds.median / base:.2f}"]))


if __name__ == "__main__":
    run(documents)
