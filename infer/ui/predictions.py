"""What the page shows of a model: growing text, surprisal per character, the next character's distribution. No HTML.

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

MAX_LENGTH = 5000
MAX_PROMPT_CHARS = 2000
MAX_SEED_DIGITS = 20
NUM_CANDIDATES = 5
NUM_BARS = 25
# Seconds between two updates of the page: the eye does not follow faster ones.
_UPDATE_S = 0.05
_VISIBLE = {"\n": "↵", " ": "␣", "\t": "⇥"}


@dataclass(frozen=True)
class Generated:
    """Generated text so far, without the prompt. seconds: the model's time. seed: the one that reproduces it."""

    text: str
    seconds: float
    seed: int

    @property
    def chars_per_s(self) -> float:
        """Characters per second; 0 before the first."""
        return len(self.text) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Character:
    """A character of a text with its surprisal in bits, -log2 p(character | all before it).

    candidates: the most likely symbols in its place with their probabilities; for a byte vocabulary, those of its
    first byte.
    """

    char: str
    bits: float
    candidates: list[tuple[str, float]]


@dataclass(frozen=True)
class Bar:
    """A symbol's probability as the model predicts it, and after temperature, top-k and top-p."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Distribution:
    """The next character's distribution.

    bars: the NUM_BARS most likely symbols; others: the sum of the rest. kept: symbols with a probability above 0 after
    the sampling options, of vocab_size V. entropy: in bits, before and after.
    """

    bars: list[Bar]
    others: Bar
    kept: int
    vocab_size: int
    entropy: tuple[float, float]


def generate(
    engine: Engine,
    prompt: str,
    length: float,
    temperature: float,
    top_k: float,
    top_p: float,
    seed: str,
    clock: Callable[[], float] = perf_counter,
) -> Iterator[Generated]:
    """Stream the continuation of a prompt; the last item is the complete text.

    Args:
        engine: The model.
        prompt: At most MAX_PROMPT_CHARS characters.
        length: Characters to generate, 1 to MAX_LENGTH.
        temperature: As in SamplingOptions, like top_k and top_p; NaN is an empty field.
        top_k: A whole number.
        top_p: Above 0, at most 1.
        seed: A whole number; empty draws a new one.
        clock: Seconds.

    Raises:
        SamplingError: An option is out of range.
        VocabError: The model cannot read the prompt.
    """
    check_text(engine.vocab, prompt)
    if not 1 <= _number(length, "length") <= MAX_LENGTH:
        raise SamplingError(f"length must be 1 to {MAX_LENGTH} characters, not {length:g}")
    options, chosen = sampling_options(temperature, top_k, top_p), _seed(seed)
    pieces = engine.generate(prompt, _integer(length, "length"), options, seed=chosen)
    text, seconds, updated = "", 0.0, clock()
    while True:
        began = clock()
        piece = next(pieces, None)
        now = clock()
        if piece is None:
            break
        text, seconds = text + piece, seconds + now - began
        if now - updated >= _UPDATE_S:
            yield Generated(text, seconds, chosen)
            updated = now
    yield Generated(text, seconds, chosen)


def surprisal(engine: Engine, text: str) -> list[Character]:
    """Return every character with its surprisal; the first one is predicted after `vocab.start_id`.

    Raises:
        VocabError: The model cannot read the text.
        SamplingError: The model's logits are not finite.
    """
    check_text(engine.vocab, text)
    ids = engine.vocab.encode(text).astype(np.int64)  # (T,)
    if not len(ids):
        return []
    inputs = np.concatenate(([engine.vocab.start_id], ids[:-1]))  # (T,)
    logits = engine.step(inputs[None], engine.zero_state(1))[0][0]  # (T, V)
    if not np.isfinite(logits).all():
        raise not_finite()
    log2p = log_softmax(logits) / np.log(2)  # (T, V)
    bits = -log2p[np.arange(len(ids)), ids]  # (T,)
    top = np.argsort(-log2p, axis=-1, kind="stable")[:, :NUM_CANDIDATES]  # (T, NUM_CANDIDATES)
    names = symbol_names(engine.vocab)
    result, start = [], 0
    for char in text:
        end = start + (len(char.encode()) if engine.vocab.kind == "bytes" else 1)
        candidates = [(names[i], float(2 ** log2p[start, i])) for i in top[start]]
        result.append(Character(char, float(bits[start:end].sum()), candidates))
        start = end
    return result


def next_character(engine: Engine, prompt: str, temperature: float, top_k: float, top_p: float) -> Distribution:
    """Return the distribution after a prompt, before and after the sampling options.

    An empty prompt is `vocab.start_id`. Raises: as `generate`.
    """
    check_text(engine.vocab, prompt)
    options = sampling_options(temperature, top_k, top_p)
    logits = engine.prefill(engine.vocab.begun(engine.vocab.encode(prompt)))[0][0]  # (V,)
    before = probabilities(logits)  # (V,)
    after = probabilities(logits, options.temperature, options.top_k, options.top_p)  # (V,)
    names = symbol_names(engine.vocab)
    order = np.argsort(-before, kind="stable")  # (V,)
    rest = order[NUM_BARS:]
    return Distribution(
        bars=[Bar(names[i], float(before[i]), float(after[i])) for i in order[:NUM_BARS]],
        others=Bar(f"{len(rest)} more", float(before[rest].sum()), float(after[rest].sum())),
        kept=int((after > 0).sum()),
        vocab_size=len(engine.vocab),
        entropy=(_entropy(before), _entropy(after)),
    )


def sampling_options(temperature: float, top_k: float, top_p: float) -> SamplingOptions:
    """Return the options of three number fields. Raises: SamplingError when one is empty or out of range."""
    return SamplingOptions(_number(temperature, "temperature"), _integer(top_k, "top-k"), _number(top_p, "top-p"))


def symbol_names(vocab: Vocab) -> list[str]:
    """Return a visible name for every id: signs for whitespace, hexadecimal for bytes beyond ASCII."""
    if vocab.kind == "bytes":
        return [visible(chr(byte)) if byte < 0x80 else f"0x{byte:02X}" for byte in range(256)]
    return [visible(symbol) for symbol in vocab.symbols]


def visible(char: str) -> str:
    """Return the character itself if it is printable, else a sign or its code point."""
    if char in _VISIBLE:
        return _VISIBLE[char]
    return char if char.isprintable() else f"U+{ord(char):04X}"


def check_text(vocab: Vocab, text: str) -> None:
    """Raise VocabError for a text that is too long for the page, or that the model cannot read."""
    if len(text) > MAX_PROMPT_CHARS:
        raise VocabError(f"the text has {len(text):,} characters; this page reads {MAX_PROMPT_CHARS:,} at most")
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        raise VocabError("the text is not valid Unicode (it has half of a surrogate pair); paste it again")
    if unknown := vocab.unknown_in(text):
        names = listing([f"{char!r} (U+{ord(char):04X})" for char in unknown])
        raise VocabError(f"not in this model's vocabulary: {names}; remove it, or choose a model trained on it")


def _seed(text: str) -> int:
    digits = text.strip()
    if not digits:
        return fresh_seed()
    if not digits.isdecimal():
        raise SamplingError(
            f"seed must be a whole number of 0 or more, not {text[:40]!r}; leave it empty for a new one"
        )
    if len(digits) > MAX_SEED_DIGITS:
        raise SamplingError(f"the seed has {len(digits)} digits; this page takes {MAX_SEED_DIGITS} at most")
    return int(digits)


def _number(value: float, name: str) -> float:
    """Return a field's value; NaN is an empty one."""
    if not math.isfinite(value):
        raise SamplingError(f"{name} has no number; type one, or move the slider")
    return float(value)


def _integer(value: float, name: str) -> int:
    if _number(value, name) != int(value):
        raise SamplingError(f"{name} must be a whole number, not {value:g}")
    return int(value)


def _entropy(p: NDArray[np.float64]) -> float:
    """Entropy in bits of a distribution (V,)."""
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum()) + 0.0
