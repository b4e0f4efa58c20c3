"""From logits to probabilities to ids: temperature, top-k, top-p, min-p and the repetition penalty. numpy only.

Model files have the same rules in their graph (train/export/onnx_sampling.py), and tests compare the two.
Letters: B batch, V vocabulary size.
"""

import math
import numbers
import operator
import reprlib
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import SamplingError

Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SamplingOptions:
    """How a character is sampled from its logits; the repetition penalty applies first, the rest in this order.

    Attributes:
        temperature: Divides the logits; 0 is argmax.
        top_k: Sample from the k most likely characters; 0 = all.
        top_p: Nucleus threshold, above 0 to 1; 1 = all.
        min_p: Minimum probability as a fraction of the most likely character's, 0 to 1; 0 = all.
        repetition_penalty: 1 or more; divides the positive logits of recent characters, multiplies negative ones;
            1 = none.
        repetition_window: Characters that the penalty looks back on; 0 = the text so far, prompt included.

    Raises:
        SamplingError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, real_number(getattr(self, name), name))
        for name in ("top_k", "repetition_window"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(
                f"temperature must be 0 (always the likeliest character) or a positive number, not {self.temperature}"
            )
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (all characters) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must lie above 0 and be at most 1 (all characters), not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p must lie between 0 (all characters) and 1, not {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty >= 1):
            raise SamplingError(f"repetition_penalty must be 1 (none) or more, not {self.repetition_penalty}")
        if self.repetition_window < 0:
            raise SamplingError(f"repetition_window must be 0 (the whole text) or more, not {self.repetition_window}")


def real_number(value: object, name: str) -> float:
    """Return an argument as a float. Raises: SamplingError that names it if it is no number, or too large for one."""
    if not isinstance(value, numbers.Real):
        raise SamplingError(f"{name} must be a number, not {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError:
        raise SamplingError(f"{name} is too large: {reprlib.repr(value)}") from None


def whole_number(value: object, name: str) -> int:
    """Return an argument, numpy's types included, as an int. Raises: SamplingError that names it if it is none."""
    try:
        return operator.index(value)  # type: ignore[arg-type]  # which is what it finds out
    except TypeError:
        raise SamplingError(f"{name} must be a whole number, not {reprlib.repr(value)}") from None


def probabilities(
    logits: Floats, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> NDArray[np.float64]:
    """Return the distribution that the next character is sampled from.

    Temperature 0 puts everything on the most likely id. Else the logits are divided by the temperature; the top_k most
    likely are kept; of those the fewest whose probability reaches top_p (at least one); of those the ones at least
    min_p times as likely as the most likely. The rest get 0. Equal logits rank by id, the lower first.

    Sources: top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, arXiv:1904.09751; min-p:
    Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024, arXiv:2407.01082.

    Args:
        logits: (..., V).
        temperature: As in `SamplingOptions`, like the rest.
        top_k: Above V it keeps all.
        top_p: See above.
        min_p: See above.

    Returns:
        (..., V) float64; each row sums to 1.

    Raises:
        SamplingError: for options out of range, or logits without a finite maximum.
    """
    shares = shares_of(logits, SamplingOptions(temperature, top_k, top_p, min_p))
    return shares / shares.sum(axis=-1, keepdims=True)


def shares_of(logits: Floats, options: SamplingOptions) -> NDArray[np.float64]:
    """`probabilities`, unnormalised: the most likely has 1. logits: (..., V). Returns (..., V)."""
    wide = np.asarray(logits, np.float64)  # (..., V)
    peak = wide.max(axis=-1, keepdims=True)  # (..., 1)
    if not np.isfinite(peak).all():
        raise not_finite()
    if options.temperature == 0:
        return np.asarray(np.arange(wide.shape[-1]) == wide.argmax(axis=-1)[..., None], np.float64)
    # The peak goes first, so that a tiny temperature makes 0 and -inf out of it, never inf - inf.
    with np.errstate(over="ignore"):
        shares = np.exp((wide - peak) / options.temperature)  # (..., V)
    if 0 < options.top_k < wide.shape[-1] or options.top_p < 1:
        shares = np.where(_kept(wide, shares, options), shares, 0.0)
    return np.where(shares >= options.min_p, shares, 0.0) if options.min_p else shares


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Return log probabilities in float64. logits: (..., V). Returns (..., V)."""
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def not_finite() -> SamplingError:
    """Return the error for a model whose logits are NaN or infinite."""
    return SamplingError("the model's logits are not finite: its weights are damaged, or its training diverged")


def _kept(logits: Floats, shares: NDArray[np.float64], options: SamplingOptions) -> NDArray[np.bool_]:
    """Return which entries top-k and then top-p keep: (..., V)."""
    order = np.argsort(-logits, axis=-1, kind="stable")  # (..., V), the likeliest first, ties by id
    by_rank = np.empty(logits.shape, bool)
    by_rank[...] = np.arange(logits.shape[-1]) < (options.top_k or logits.shape[-1])
    if options.top_p < 1:
        mass = np.where(by_rank, np.take_along_axis(shares, order, axis=-1), 0.0).cumsum(axis=-1)
        before = np.roll(mass, 1, axis=-1)  # the mass of all that is likelier
        before[..., 0] = 0.0
        by_rank &= before < options.top_p * mass[..., -1:]
    kept = np.empty_like(by_rank)
    np.put_along_axis(kept, order, by_rank, axis=-1)
    return kept


def penalised(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float64]:
    """Divide the logits of `seen` characters by the penalty where positive, and multiplies where negative.

    Source: Keskar et al., "CTRL", 2019, arXiv:1909.05858, section 4.1, with the sign as Hugging Face's transformers
    treats it: dividing a negative logit would make its character more likely.

    Args:
        logits: (..., V).
        seen: (..., V).
        penalty: At least 1.

    Returns:
        (..., V) float64.
    """
    wide = np.asarray(logits, np.float64)
    return np.where(seen, np.where(wide > 0, wide / penalty, wide * penalty), wide)


def draw(shares: NDArray[np.float64], uniforms: NDArray[np.float64]) -> Ids:
    """Sample one id per row by inverting the cumulative distribution over the ids in their order.

    Args:
        shares: (B, V), probabilities up to a factor.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64; an id whose share is 0 never occurs.
    """
    cumulative = shares.cumsum(axis=-1)  # (B, V)
    targets = uniforms[:, None] * cumulative[:, -1:]  # (B, 1)
    return (cumulative <= targets).sum(axis=-1, dtype=np.int64)


def random_streams(length: int, seeds: Sequence[int]) -> list[np.random.Generator]:
    """Return a generator per seed. Raises: SamplingError for a length or a seed below 0."""
    if length < 0:
        raise SamplingError(f"length must be 0 characters or more, not {length}")
    if min(seeds) < 0:
        raise SamplingError(f"a seed must be 0 or more, not {min(seeds)}")
    return [np.random.default_rng(seed) for seed in seeds]


class History:
    """The characters before in each of B streams, as far as the repetition penalty looks back.

    Args:
        rows: B sequences of ids.
        options: The penalty and its window.
    """

    def __init__(self, rows: Sequence[Iterable[int]], options: SamplingOptions) -> None:
        self._penalty = options.repetition_penalty
        # No text is longer than the largest length of a deque.
        longest = min(options.repetition_window, sys.maxsize) or None
        self._rows = [deque(map(int, row), longest) for row in rows] if self._penalty != 1 else []

    def penalise(self, logits: Floats) -> Floats:
        """Apply the penalty to logits (B, V). Returns (B, V)."""
        if self._penalty == 1:
            return logits
        seen = np.zeros(logits.shape, bool)
        for row, ids in zip(seen, self._rows, strict=True):
            row[list(ids)] = True
        return penalised(logits, seen, self._penalty)

    def add(self, ids: Ids) -> None:
        """Add one character per stream, ids (B,)."""
        if self._penalty != 1:
            for row, i in zip(self._rows, ids, strict=True):
                row.append(int(i))
