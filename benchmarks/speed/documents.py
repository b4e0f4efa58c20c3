"""What starting the state anew at documents' ends costs: a training step on documents of several mean lengths.

    python -m benchmarks.speed.documents [--rounds 5]

A step is forward and backward of a batch of random characters. Ends are drawn at random, so that rows have them at
different places; the window is run in as many pieces as there are places. Medians (quartiles) over rounds in turn.
"""

import argparse
import statistics
from time import perf_counter

import torch

from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN, NextCharLoss

SYMBOLS, BATCH, LENGTH = 65, 64, 128
MEAN_CHARS = (0, 100_000, 10_000, 1_000, 100)  # 0: the network knows of no documents


def step_s(loss: NextCharLoss, window: torch.Tensor) -> float:
    """Seconds of one forward and backward pass. window: (B, T + 1) ids."""
    began = perf_counter()
    value, _ = loss(window, loss.model.zero_state(len(window)))
    value.backward()
    loss.zero_grad()
    return perf_counter() - began


def window_of(mean_chars: int, seed: int) -> torch.Tensor:
    """(B, T + 1) random ids; id 0 ends a document, one character in `mean_chars`, and does not occur for 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SYMBOLS, (BATCH, LENGTH + 1), generator=generator)
    if mean_chars:
        ids[torch.rand(ids.shape, generator=generator) < 1 / mean_chars] = 0
    return ids


def measure(rnn: str, rounds: int) -> list[tuple[int, float, list[float]]]:
    """For each mean length: the mean number of pieces of a window, and seconds of a step in each round."""
    shape = ModelConfig.model_validate({"rnn": rnn})
    plain, marked = (NextCharLoss(CharRNN(shape, SYMBOLS, end)) for end in (None, 0))
    rows: list[tuple[int, float, list[float]]] = [(mean, 0.0, []) for mean in MEAN_CHARS]
    pieces = [0.0] * len(rows)
    for round_ in range(rounds + 1):
        for i, (mean, _, seconds) in enumerate(rows):
            window = window_of(mean, round_)
            spent = step_s(marked if mean else plain, window)
            if round_:  # the first warms up
                seconds.append(spent)
                pieces[i] += (1 + int((window[:, 1:-1] == 0).any(0).sum())) / rounds
    return [(mean, pieces[i], seconds) for i, (mean, _, seconds) in enumerate(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each figure is taken (default 5)")
    rounds = parser.parse_args().rounds
    print(
        f"2 x 256, {BATCH} x {LENGTH} characters a step, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print("| cell | characters a document | pieces a window | ms a step | of the plain step |")
    print("|---|--:|--:|--:|--:|")
    for rnn in ("GRU", "LSTM"):
        rows = measure(rnn, rounds)
        base = statistics.median(rows[0][2])
        for mean, pieces, seconds in rows:
            low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
            spread = f"{1e3 * middle:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"
            print(f"| {rnn} | {mean or 'no documents'} | {pieces:.1f} | {spread} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
