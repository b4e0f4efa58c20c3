"""What the commands say about a model file, a score and a generation: as facts for --json, and as lines to read."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from charrnn.errors import printable

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.scoring import Score, ScoredText

# A Chinese corpus has thousands of characters; --json lists them all.
_SHOWN_SYMBOLS = 300


def model_facts(engine: "Engine") -> dict[str, Any]:
    """Everything that `infer info --json` prints."""
    vocab = engine.vocab
    return {
        "file": str(engine.path),
        "bytes": engine.path.stat().st_size,
        "format_version": int(engine.metadata["charrnn.format_version"]),
        "precision": engine.metadata.get("charrnn.precision", "fp32"),
        "model": engine.config["model"],
        "parameters": engine.metrics.get("parameters"),
        "vocab": {
            "kind": vocab.kind,
            "size": len(vocab),
            "symbols": list(vocab.symbols),
            "replacement": vocab.replacement,
            "document_end": vocab.document_end,
        },
        "corpus": engine.corpus | {"sha256": engine.metadata.get("charrnn.corpus_sha256")},
        "metrics": engine.metrics,
        "config": engine.config,
    }


def to_json(facts: Any) -> str:
    """One JSON object on one line; numbers that JSON has not (NaN, infinity) are null."""
    return json.dumps(_finite(facts), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def describe_model(facts: dict[str, Any]) -> str:
    """`model_facts` as lines; what the file does not record is left out."""
    lines = {
        "file": f"{facts['file']} ({facts['bytes'] / 2**20:.2f} MiB, format version {facts['format_version']})",
        "model": _model_line(facts),
        "vocabulary": _vocab_line(facts["vocab"]),
        "corpus": _corpus_line(facts["corpus"]),
        "training": _training_line(facts["metrics"]),
        "validation": _validation_line(facts["metrics"]),
    }
    # What a file says must not look like what we say of it.
    return "\n".join(f"{name:<12}{printable(line)}" for name, line in lines.items() if line)


def _model_line(facts: dict[str, Any]) -> str:
    model = facts["model"]
    layers = "layer" if model["num_layers"] == 1 else "layers"
    parts = [f"{model['rnn']}, {model['num_layers']} {layers} of {model['hidden_dim']}"]
    parts += [facts["precision"]]
    parts += [f"embedding {model['embedding_dim']}"] if "embedding_dim" in model else []
    parts += [f"{_figure(facts['parameters'], ',')} parameters"] if facts["parameters"] is not None else []
    return ", ".join(parts)


def _vocab_line(vocab: dict[str, Any]) -> str:
    ends = "" if vocab["document_end"] is None else f"; documents end with {vocab['document_end']!r}"
    if vocab["kind"] == "bytes":
        return "256 bytes: any text" + ends
    more = vocab["size"] - _SHOWN_SYMBOLS
    shown = repr("".join(vocab["symbols"][:_SHOWN_SYMBOLS]))
    return f"{vocab['size']} characters: {shown}" + (f" and {more:,} more" if more > 0 else "") + ends


def _corpus_line(corpus: dict[str, Any]) -> str:
    parts = [f"{corpus['name']}"] if "name" in corpus else []
    parts += [f"from {corpus['source']}"] if corpus.get("source", corpus.get("name")) != corpus.get("name") else []
    parts += [f"{_figure(corpus['num_chars'], ',')} characters"] if "num_chars" in corpus else []
    parts += [f"sha256 {corpus['sha256']}"] if corpus["sha256"] else []
    return ", ".join(parts)


def _training_line(metrics: dict[str, Any]) -> str:
    words = {"step": "{} steps", "chars": "{} characters", "time_s": "{} s", "hardware": "on {}"}
    return ", ".join(form.format(_figure(metrics[key], ",.0f")) for key, form in words.items() if key in metrics)


def _validation_line(metrics: dict[str, Any]) -> str:
    parts = []
    for protocol in ("stream", "windows"):
        loss, bpc = (metrics.get(f"val/{protocol}/{unit}") for unit in ("loss", "bpc"))
        if loss is not None:
            parts.append(f"{protocol} {_figure(loss, '.4f')} nats/char ({_figure(bpc, '.4f')} bits/char)")
    return ", ".join(parts)


def _figure(value: object, form: str) -> str:
    """A number in the given form; a file may record anything, and what is no number is shown as it is."""
    try:
        return format(value, form) if isinstance(value, int | float) else str(value)
    except OverflowError:  # an integer that no float holds
        return str(value)


def score_facts(model: str, file: str, split: str, text: "ScoredText", scores: dict[str, "Score"]) -> dict[str, Any]:
    """Everything that `infer score --json` prints."""
    return {
        "model": model,
        "file": file,
        "split": split,
        "chars": text.chars,
        "unknown_chars": text.unknown_chars,
        "unknown": text.unknown,
        "is_training_corpus": text.is_corpus,
    } | {
        name: {
            "nats_per_char": score.nats_per_char,
            "bits_per_char": score.bits_per_char,
            "perplexity": score.perplexity,
            "chars": score.chars,
        }
        for name, score in scores.items()
    }


def describe_scores(facts: dict[str, Any]) -> str:
    """`score_facts` as a table."""
    origin = ", of the corpus this model was trained on" if facts["is_training_corpus"] else ""
    lines = [
        f"{printable(facts['file'])}, split {facts['split']}: {facts['chars']:,} characters, "
        f"{facts['unknown_chars']:,} of them unknown{origin}",
        f"{'protocol':<10}{'nats/char':>11}{'bits/char':>11}{'perplexity':>12}{'predicted':>14}",
    ]
    for name in ("stream", "windows"):
        s = facts[name]
        figures = f"{s['nats_per_char']:>11.4f}{s['bits_per_char']:>11.4f}{s['perplexity']:>12.3f}{s['chars']:>14,}"
        lines.append(f"{name:<10}{figures}")
    return "\n".join(lines)


@dataclass
class Timing:
    """When a generation began, had its model and wrote its first text (by perf_counter), and how much it wrote."""

    started: float = field(default_factory=perf_counter)
    loaded: float = 0.0
    first: float = 0.0
    chars: int = 0

    def count(self, pieces: Iterable[str]) -> Iterator[str]:
        """Passes the pieces on."""
        for piece in pieces:
            self.first = self.first or perf_counter()
            self.chars += len(piece)
            yield piece

    def report(self, seed: int) -> str:
        """The line of --stats."""
        now = perf_counter()
        seconds = now - self.loaded
        return (
            f"seed {seed}; model loaded in {self.loaded - self.started:.3f} s; first text after "
            f"{(self.first or now) - self.loaded:.3f} s; {self.chars:,} characters in {seconds:.3f} s "
            f"({self.chars / seconds:,.0f} characters/s)"
        )
