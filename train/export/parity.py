"""How far an exported file's predictions are from the model's it was made of."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from charrnn.model.rnn import CharRNN
from charrnn.sampling import log_softmax
from infer.engine import Engine

State = tuple[NDArray[np.float32], ...]
Step = Callable[[NDArray[np.int64], State], tuple[NDArray[np.float32], State]]
_Result = tuple[NDArray[np.float32], State]


def step_of(model: CharRNN) -> Step:
    """Return the network as a function of arrays, in float32 on the CPU."""
    model = model.eval().cpu().float()

    @torch.no_grad()
    def step(ids: NDArray[np.int64], state: State) -> _Result:
        logits, after = model(torch.from_numpy(ids), tuple(torch.from_numpy(part) for part in state))
        return logits.numpy(), tuple(part.numpy() for part in after)

    return step


def parity(exact: Step, engine: Engine) -> float:
    """Return the largest absolute difference of logits and states."""
    worst = 0.0
    for (logits, state), (theirs, theirs_next) in _both(exact, engine):
        for ours, other in zip((logits, *state), (theirs, *theirs_next), strict=True):
            # max() passes over a NaN, and a NaN must fail.
            difference = float(np.abs(ours - other).max())
            worst = difference if math.isnan(difference) else max(worst, difference)
    return worst


def divergence(exact: Step, engine: Engine) -> float:
    """Return the mean Kullback-Leibler divergence, in nats, of an engine's predictions from the exact ones."""
    found = []
    for (logits, _), (theirs, _) in _both(exact, engine):
        p, q = log_softmax(logits), log_softmax(theirs)  # (B, T, V)
        found.append((np.exp(p) * (p - q)).sum(axis=-1).ravel())
    return float(np.concatenate(found).mean())


def _both(exact: Step, engine: Engine) -> Iterator[tuple[_Result, tuple[Any, State]]]:
    """Yield both results for batches {1, 3} x lengths {1, 7}, each of random ids and a random state (fixed seed)."""
    rng = np.random.default_rng(0)
    for batch, length in ((1, 1), (1, 7), (3, 1), (3, 7)):
        ids = rng.integers(len(engine.vocab), size=(batch, length))
        # h lies between -1 and 1 by nature.
        state = tuple(rng.uniform(-1, 1, part.shape).astype(np.float32) for part in engine.zero_state(batch))
        yield exact(ids, state), engine.step(ids, state)
