"""How well a model predicts a text: nats and bits per character, by both protocols of charrnn.windows. numpy only.

train/loop/evaluation.py is the same with torch, and gives the same numbers. Letters: N characters of the text, R rows
side by side, T characters in a call, V vocabulary size.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import CorpusError, ModelFileError
from charrnn.sampling import log_softmax
from charrnn.vocab import Unknown
from charrnn.windows import EvalBatch, split_bounds, stream_batch, window_batches
from infer.engine import Engine
from infer.text_io import decode

# Logits in memory at once, R * T * V of them: 32 MB as float64.
_MAX_LOGITS = 1 << 22
# charrnn.config.EvalConfig's defaults and lower limits, for a file that records no eval section.
_EVAL_FIELDS = {"window": (256, 1), "batch_rows": (64, 1), "stream_lanes": (16, 1), "stream_warmup": (512, 0)}


@dataclass(frozen=True)
class Score:
    """A text's mean loss.

    Attributes:
        nats_per_char: Mean negative log likelihood, in nats.
        chars: Characters that were predicted.
    """

    nats_per_char: float
    chars: int

    @property
    def bits_per_char(self) -> float:
        """The loss in bits: nats / ln 2."""
        return self.nats_per_char / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats); infinite if it overflows."""
        try:
            return math.exp(self.nats_per_char)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class ScoredText:
    """The part of a file that is scored.

    Attributes:
        ids: (N,).
        chars: Its characters (bytes for a byte vocabulary), the unknown ones included.
        unknown: The distinct characters that the vocabulary lacks.
        unknown_chars: How many there are.
        is_corpus: Whether the complete file is the corpus that the model was trained on.
    """

    ids: NDArray[Any]
    chars: int
    unknown: list[str]
    unknown_chars: int
    is_corpus: bool


def read_text(engine: Engine, raw: bytes, split: str, unknown: Unknown) -> ScoredText:
    """Encode a file's bytes, as the corpus was when the model was trained.

    Args:
        engine: The model.
        raw: The file's bytes. For a model that knows where documents end, the end symbol is added if it is missing.
        split: `all`, or the `train`, `val` or `test` part by the fractions that the model was trained with.
        unknown: What to do with unknown characters: error, skip or replace.

    Raises:
        CorpusError: for bytes that are not UTF-8 (a byte vocabulary takes any).
        VocabError: for unknown characters.
    """
    end = engine.vocab.document_end
    if end is not None and raw and not raw.endswith(end.encode()):
        raw += end.encode()
    is_bytes = engine.vocab.kind == "bytes"
    text: Any = raw if is_bytes else decode(raw, "the text", engine.vocab)
    digest = hashlib.sha256(raw if is_bytes else text.encode()).hexdigest()
    is_corpus = digest == engine.metadata.get("charrnn.corpus_sha256")
    part = text[slice(*_bounds(engine, len(text), split))]
    if is_bytes:
        return ScoredText(np.frombuffer(part, np.uint8), len(part), [], 0, is_corpus)
    ids = engine.vocab.encode(part, unknown)
    unknown_chars = len(part) - len(engine.vocab.encode(part, "skip"))
    return ScoredText(ids, len(part), engine.vocab.unknown_in(part), unknown_chars, is_corpus)


def _bounds(engine: Engine, num_chars: int, split: str) -> tuple[int, int]:
    if split == "all":
        return 0, num_chars
    data = engine.config.get("data")
    fractions = data.get("split") if isinstance(data, dict) else None
    if not (isinstance(fractions, list) and len(fractions) == 3 and all(type(f) in (int, float) for f in fractions)):
        raise ModelFileError(f"{engine.path} does not say how its corpus was split; use --split all")
    return split_bounds(num_chars, (fractions[0], fractions[1], fractions[2]))[split]


def score(engine: Engine, ids: NDArray[Any]) -> dict[str, Score]:
    """Return the `stream` and `windows` scores of a text.

    Window, rows and warm-up are those of the model's own validation.

    Args:
        engine: The model.
        ids: (N,), N at least 2.

    Raises:
        CorpusError: for a text with nothing to predict.
        ModelFileError: for a model whose loss is not finite.
    """
    if len(ids) < 2:
        raise CorpusError(f"the text has {len(ids)} character(s) to score; it takes at least 2 to predict one")
    fields = _eval_fields(engine)
    protocols: dict[str, Iterable[EvalBatch]] = {
        "stream": [stream_batch(len(ids), fields["stream_lanes"], fields["stream_warmup"])],
        "windows": window_batches(len(ids), fields["window"], fields["batch_rows"]),
    }
    scores = {}
    for name, batches in protocols.items():
        rows = fields["stream_lanes" if name == "stream" else "batch_rows"]
        chunk = max(1, _MAX_LOGITS // (rows * len(engine.vocab)))
        nll, chars = evaluate(engine, ids, batches, chunk)
        if not math.isfinite(nll):
            raise ModelFileError(f"{engine.path} gives a loss of {nll}: its weights are damaged, or training diverged")
        scores[name] = Score(nll / chars, chars)
    return scores


def evaluate(engine: Engine, ids: NDArray[Any], batches: Iterable[EvalBatch], chunk: int) -> tuple[float, int]:
    """Return the summed negative log likelihood in nats, and the number of characters it is summed over.

    Args:
        engine: The model.
        ids: (N,).
        batches: Where each row starts, and which positions count.
        chunk: The most characters T of a row in one call, which bounds the memory.
    """
    total, count = 0.0, 0
    for batch in batches:
        state = engine.zero_state(len(batch.starts))
        for part in batch.chunks(chunk):
            positions = part.starts[:, None] + np.arange(part.length + 1)  # (R, T + 1)
            # Positions past the end are never counted; they only have to be some id, to fill the rectangle.
            window = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
            logits, state = engine.step(window[:, :-1], state)  # (R, T, V)
            total += float(_nll(logits, window[:, 1:])[part.counted].sum())
            count += int(part.counted.sum())
    return total, count


def _nll(logits: NDArray[Any], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] in float64. logits: (R, T, V), targets: (R, T). Returns (R, T)."""
    return -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def _eval_fields(engine: Engine) -> dict[str, int]:
    recorded = engine.config.get("eval", {})
    if not isinstance(recorded, dict):
        raise ModelFileError(f"{engine.path}: charrnn.config's eval is not a section; export it again")
    fields = {}
    for name, (default, least) in _EVAL_FIELDS.items():
        value = recorded.get(name, default)
        if type(value) is not int or value < least:
            raise ModelFileError(f"{engine.path}: charrnn.config says eval.{name} {value!r}; export it again")
        fields[name] = value
    return fields
