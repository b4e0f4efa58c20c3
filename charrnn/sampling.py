"""Logits to probabilities to ids: temperature, top-k and top-p, and the loop that generates. numpy only.

One implementation serves the trainer's samples, the command line and the page. Letters: B batch, V vocabulary size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import SamplingError

Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.int64]
State = TypeVar("State")


@dataclass(frozen=True)
class SamplingOptions:
    """How a character is drawn from its logits.

    temperature: divides the logits; 0 takes the likeliest. top_k: draw among the k likeliest; 0 = all.
    top_p: draw among the likeliest that together hold this probability; 1 = all.
    Raises: SamplingError when a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(
                f"temperature must be 0 (always the likeliest character) or a positive number, not {self.temperature}"
            )
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (all characters) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must lie above 0 and be at most 1 (all characters), not {self.top_p}")


def probabilities(logits: Floats, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> NDArray[np.float64]:
    """The distribution that the next character is drawn from.

    Temperature 0 puts everything on the likeliest id. Else the logits are divided by the temperature, the top_k
    likeliest are kept, then of those the fewest likeliest whose share reaches top_p (at least one); the rest get 0.
    Equal logits rank by id, the lower first. A top_k above V keeps all.

    logits: (..., V). Returns (..., V) float64; each row sums to 1.
    Raises: SamplingError for options out of range, or logits without a finite maximum.
    Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, arXiv:1904.09751.
    """
    return _probabilities(logits, SamplingOptions(temperature, top_k, top_p))


def _probabilities(logits: Floats, options: SamplingOptions) -> NDArray[np.float64]:
    wide = np.asarray(logits, np.float64)  # (..., V)
    peak = wide.max(axis=-1, keepdims=True)  # (..., 1)
    if not np.isfinite(peak).all():
        raise SamplingError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if options.temperature == 0:
        return np.asarray(np.arange(wide.shape[-1]) == wide.argmax(axis=-1)[..., None], np.float64)
    # The peak goes first, so that a tiny temperature makes 0 and -inf out of it, never inf - inf.
    with np.errstate(over="ignore"):
        weights = np.exp((wide - peak) / options.temperature)  # (..., V), the likeliest has 1
    if 0 < options.top_k < wide.shape[-1] or options.top_p < 1:
        weights = np.where(_kept(wide, weights, options), weights, 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def _kept(logits: Floats, weights: NDArray[np.float64], options: SamplingOptions) -> NDArray[np.bool_]:
    """Which entries top-k and then top-p leave: (..., V)."""
    order = np.argsort(-logits, axis=-1, kind="stable")  # (..., V), the likeliest first, ties by id
    by_rank = np.empty(logits.shape, bool)
    by_rank[...] = np.arange(logits.shape[-1]) < (options.top_k or logits.shape[-1])
    if options.top_p < 1:
        mass = np.where(by_rank, np.take_along_axis(weights, order, axis=-1), 0.0).cumsum(axis=-1)
        before = np.roll(mass, 1, axis=-1)  # the mass of all that is likelier
        before[..., 0] = 0.0
        by_rank &= before < options.top_p * mass[..., -1:]
    kept = np.empty_like(by_rank)
    np.put_along_axis(kept, order, by_rank, axis=-1)
    return kept


def draw(probabilities: NDArray[np.float64], uniforms: NDArray[np.float64]) -> Ids:
    """One id a row, by inverting the cumulative distribution over the ids in their order.

    probabilities: (B, V), rows summing to 1 up to rounding. uniforms: (B,) in [0, 1). Returns (B,) int64;
    an id of probability 0 is never drawn.
    """
    cumulative = probabilities.cumsum(axis=-1)  # (B, V)
    # Scaled by the true total, or a uniform next to 1 could lie beyond a sum that rounding left below it.
    targets = uniforms[:, None] * cumulative[:, -1:]  # (B, 1)
    return (cumulative <= targets).sum(axis=-1, dtype=np.int64)


def generate(
    step: Callable[[Ids, State], tuple[Any, State]],
    state: State,
    logits: Any,
    length: int,
    options: SamplingOptions,
    seeds: Sequence[int],
) -> Iterator[Ids]:
    """Draws `length` characters for each of B streams, feeding each back to the model.

    step: (ids (B, 1), state) -> (logits (B, 1, V), state). logits: (B, V), what the prompt ended with.
    Row b takes one uniform a character from numpy's default generator seeded with seeds[b], so that a batch draws
    what its rows would draw alone. Yields (B,) ids; the last needs no further step.
    Raises: SamplingError, at the call, for a length or a seed below 0.
    """
    if length < 0:
        raise SamplingError(f"length must be 0 characters or more, not {length}")
    if min(seeds) < 0:
        raise SamplingError(f"a seed must be 0 or more, not {min(seeds)}")
    streams = [np.random.default_rng(seed) for seed in seeds]

    def drawn(logits: Any, state: State) -> Iterator[Ids]:
        for remaining in range(length, 0, -1):
            uniforms = np.array([stream.random() for stream in streams])  # (B,)
            ids = draw(_probabilities(np.asarray(logits), options), uniforms)  # (B,)
            yield ids
            if remaining > 1:
                stepped, state = step(ids[:, None], state)  # (B, 1, V)
                logits = stepped[:, 0]  # (B, V)

    return drawn(logits, state)
