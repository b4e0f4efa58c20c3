"""What the page computes: text in growing pieces, the surprise of every character, the odds of the next one. No HTML.

Letters: T characters of a text, V vocabulary size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import SamplingError, VocabError, listing
from charrnn.sampling import SamplingOptions, log_softmax, not_finite, probabilities
from charrnn.vocab import Vocab
from infer.engine import Engine, fresh_seed

MOST_CHARS = 5000
MOST_PROMPT_CHARS = 2000
MOST_SEED_DIGITS = 20
CANDIDATES = 5
SHOWN = 25
# The least time between two states sent to the page: what is faster than the eye only costs.
_SEND_EVERY_S = 0.05
_NAMES = {"\n": "↵", " ": "␣", "\t": "⇥"}


@dataclass(frozen=True)
class Written:
    """Text so far, without its prompt. seconds: the time that the model took for it. seed: what repeats it."""

    text: str
    seconds: float
    seed: int

    @property
    def chars_per_s(self) -> float:
        """Characters a second; 0 before the first."""
        return len(self.text) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Read:
    """A character of a text that was read. bits: its surprise, -log2 of its probability after all before it.

    candidates: the likeliest in its place, by name, with their probabilities; for a byte vocabulary, those of its
    first byte.
    """

    char: str
    bits: float
    candidates: list[tuple[str, float]]


@dataclass(frozen=True)
class Odds:
    """A character's probability as the model gives it, and after temperature, top-k and top-p."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Distribution:
    """The next character's distribution. shown: the likeliest ones; others: all the rest, summed up.

    kept: characters that can still be drawn, of num_symbols V. entropy: in bits, before and after.
    """

    shown: list[Odds]
    others: Odds
    kept: int
    num_symbols: int
    entropy: tuple[float, float]


def stream(
    engine: Engine,
    prompt: str,
    length: float,
    temperature: float,
    top_k: float,
    top_p: float,
    seed: str,
    clock: Callable[[], float] = perf_counter,
) -> Iterator[Written]:
    """The growing text after the prompt; the last item is the whole.

    length: characters, 1 to MOST_CHARS. seed: a whole number; "" draws a new one. clock: in seconds.
    Raises: SamplingError for an option out of range, VocabError for a prompt that the model cannot read.
    """
    check_text(engine.vocab, prompt)
    if not 1 <= _number(length, "length") <= MOST_CHARS:
        raise SamplingError(f"the length must be 1 to {MOST_CHARS} characters, not {length:g}")
    chosen = _seed(seed)
    pieces = engine.generate(
        prompt,
        length=_whole(length, "length"),
        options=SamplingOptions(_number(temperature, "temperature"), _whole(top_k, "top-k"), _number(top_p, "top-p")),
        seed=chosen,
    )
    text, seconds, sent = "", 0.0, clock()
    while True:
        began = clock()
        piece = next(pieces, None)
        now = clock()
        if piece is None:
            break
        text, seconds = text + piece, seconds + now - began
        if now - sent >= _SEND_EVERY_S:
            yield Written(text, seconds, chosen)
            sent = now
    yield Written(text, seconds, chosen)


def read(engine: Engine, text: str) -> list[Read]:
    """Every character of the text with its surprise, the first one's after `vocab.start_id`.

    Raises: VocabError for a text that the model cannot read; SamplingError for a model whose logits are not finite.
    """
    check_text(engine.vocab, text)
    ids = engine.vocab.encode(text).astype(np.int64)  # (T,)
    if not len(ids):
        return []
    before = np.concatenate(([engine.vocab.start_id], ids[:-1]))  # (T,)
    logits = engine.step(before[None], engine.zero_state(1))[0][0]  # (T, V)
    log2p = log2_probabilities(logits)
    bits = -log2p[np.arange(len(ids)), ids]  # (T,)
    likeliest = np.argsort(-log2p, axis=-1, kind="stable")[:, :CANDIDATES]  # (T, CANDIDATES)
    names = symbol_names(engine.vocab)
    result, start = [], 0
    for char in text:
        end = start + (len(char.encode()) if engine.vocab.kind == "bytes" else 1)
        candidates = [(names[i], float(2 ** log2p[start, i])) for i in likeliest[start]]
        result.append(Read(char, float(bits[start:end].sum()), candidates))
        start = end
    return result


def log2_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """(..., V) logits to the log2 of their softmax, (..., V). Raises: SamplingError when one is not finite."""
    if not np.isfinite(logits).all():
        raise not_finite()
    return log_softmax(logits) / np.log(2)


def next_character(engine: Engine, prompt: str, temperature: float, top_k: float, top_p: float) -> Distribution:
    """What comes after the prompt (after `vocab.start_id` when it is empty), before and after the sampling options.

    Raises: as `stream` does.
    """
    check_text(engine.vocab, prompt)
    ids = engine.vocab.encode(prompt)
    logits = engine.prefill(engine.vocab.begun(ids))[0][0]  # (V,)
    before = probabilities(logits)  # (V,)
    options = _number(temperature, "temperature"), _whole(top_k, "top-k"), _number(top_p, "top-p")
    after = probabilities(logits, *options)  # (V,)
    names = symbol_names(engine.vocab)
    order = np.argsort(-before, kind="stable")
    rest = order[SHOWN:]
    return Distribution(
        shown=[Odds(names[i], float(before[i]), float(after[i])) for i in order[:SHOWN]],
        others=Odds(f"{len(rest)} more", float(before[rest].sum()), float(after[rest].sum())),
        kept=int((after > 0).sum()),
        num_symbols=len(engine.vocab),
        entropy=(_entropy(before), _entropy(after)),
    )


def symbol_names(vocab: Vocab) -> list[str]:
    """For every id what stands for it on the page: spaces and line ends visible, a byte that is no ASCII in hex."""
    if vocab.kind == "bytes":
        return [visible(chr(byte)) if byte < 0x80 else f"0x{byte:02X}" for byte in range(256)]
    return [visible(symbol) for symbol in vocab.symbols]


def visible(char: str) -> str:
    """A sign for the character: itself if one can see it."""
    if char in _NAMES:
        return _NAMES[char]
    return char if char.isprintable() else f"U+{ord(char):04X}"


def check_text(vocab: Vocab, text: str) -> None:
    """Raises VocabError for a text that is too long for the page, or that the model cannot read."""
    if len(text) > MOST_PROMPT_CHARS:
        raise VocabError(f"the text has {len(text):,} characters; this page reads {MOST_PROMPT_CHARS:,} at most")
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        raise VocabError("the text is not valid Unicode (it has half of a surrogate pair); paste it again")
    unknown = vocab.unknown_in(text)
    if unknown:
        names = listing([f"{char!r} (U+{ord(char):04X})" for char in unknown])
        raise VocabError(
            f"this model does not know {names}; take that out, or choose a model that was trained on text with it"
        )


def _seed(text: str) -> int:
    if not text.strip():
        return fresh_seed()
    if not text.strip().isdecimal():
        raise SamplingError(
            f"the seed must be a whole number of 0 or more, not {text[:40]!r}; leave it empty for a new one"
        )
    if len(text.strip()) > MOST_SEED_DIGITS:
        raise SamplingError(f"the seed has {len(text.strip())} digits; this page takes {MOST_SEED_DIGITS} at most")
    return int(text)


def _number(value: float, what: str) -> float:
    """value: NaN for a field without a number."""
    if not math.isfinite(value):
        raise SamplingError(f"the {what} has no number; type one, or move the slider")
    return float(value)


def _whole(value: float, what: str) -> int:
    if _number(value, what) != int(value):
        raise SamplingError(f"the {what} must be a whole number, not {value:g}")
    return int(value)


def _entropy(p: NDArray[np.float64]) -> float:
    """In bits. p: (V,)."""
    drawn = p[p > 0]
    return float(-(drawn * np.log2(drawn)).sum()) + 0.0
