"""What the commands report on a model file, a score and a generation: as a dict for --json, and as text."""

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
_MAX_SYMBOLS = 300


def model_info(engine: "Engine") -> dict[str, Any]:
    """Return what `infer info --json` prints."""
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


def to_json(value: Any) -> str:
    """Return one JSON object on one line; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def format_model(info: dict[str, Any]) -> str:
    """Format `model_info` as lines; what the file does not record is left out."""
    lines = {
        "file": f"{info['file']} ({info['bytes'] / 2**20:.2f} MiB, format version {info['format_version']})",
        "model": _model_line(info),
        "vocabulary": _vocab_line(info["vocab"]),
        "corpus": _corpus_line(info["corpus"]),
        "training": _training_line(info["metrics"]),
        "validation": _validation_line(info["metrics"]),
    }
    # Text from the file must not be able to look like lines of ours.
    return "\n".join(f"{name:<12}{printable(line)}" for name, line in lines.items() if line)


def _model_line(info: dict[str, Any]) -> str:
    model = info["model"]
    layers = "layer" if model["num_layers"] == 1 else "layers"
    parts = [f"{model['rnn']}, {model['num_layers']} {layers} of {model['hidden_dim']}", info["precision"]]
    parts += [f"embedding {model['embedding_dim']}"] if "embedding_dim" in model else []
    parts += [f"{_number(info['parameters'], ',')} parameters"] if info["parameters"] is not None else []
    return ", ".join(parts)


def _vocab_line(vocab: dict[str, Any]) -> str:
    ends = "" if vocab["document_end"] is None else f"; documents end with {vocab['document_end']!r}"
    if vocab["kind"] == "bytes":
        return f"256 bytes: any text{ends}"
    more = vocab["size"] - _MAX_SYMBOLS
    shown = repr("".join(vocab["symbols"][:_MAX_SYMBOLS]))
    return f"{vocab['size']} characters: {shown}" + (f" and {more:,} more" if more > 0 else "") + ends


def _corpus_line(corpus: dict[str, Any]) -> str:
    parts = [f"{corpus['name']}"] if "name" in corpus else []
    parts += [f"from {corpus['source']}"] if corpus.get("source", corpus.get("name")) != corpus.get("name") else []
    parts += [f"{_number(corpus['num_chars'], ',')} characters"] if "num_chars" in corpus else []
    parts += [f"sha256 {corpus['sha256']}"] if corpus["sha256"] else []
    return ", ".join(parts)


def _training_line(metrics: dict[str, Any]) -> str:
    forms = {"step": "{} steps", "chars": "{} characters", "time_s": "{} s", "hardware": "on {}"}
    return ", ".join(form.format(_number(metrics[key], ",.0f")) for key, form in forms.items() if key in metrics)


def _validation_line(metrics: dict[str, Any]) -> str:
    parts = []
    for protocol in ("stream", "windows"):
        loss, bpc = (metrics.get(f"val/{protocol}/{unit}") for unit in ("loss", "bpc"))
        if loss is not None:
            parts.append(f"{protocol} {_number(loss, '.4f')} nats/char ({_number(bpc, '.4f')} bits/char)")
    return ", ".join(parts)


def _number(value: object, form: str) -> str:
    """Format a number; anything else that a file may record is shown as it is."""
    try:
        return format(value, form) if isinstance(value, int | float) else str(value)
    except OverflowError:  # an integer beyond the range of a float
        return str(value)


def score_info(model: str, file: str, split: str, text: "ScoredText", scores: dict[str, "Score"]) -> dict[str, Any]:
    """Return what `infer score --json` prints."""
    units = ("nats_per_char", "bits_per_char", "perplexity", "chars")
    return {
        "model": model,
        "file": file,
        "split": split,
        "chars": text.chars,
        "unknown_chars": text.unknown_chars,
        "unknown": text.unknown,
        "is_training_corpus": text.is_corpus,
        **{protocol: {unit: getattr(score, unit) for unit in units} for protocol, score in scores.items()},
    }


def format_scores(info: dict[str, Any]) -> str:
    """Format `score_info` as a table."""
    origin = ", the corpus this model was trained on" if info["is_training_corpus"] else ""
    lines = [
        f"{printable(info['file'])}, split {info['split']}: {info['chars']:,} characters, "
        f"{info['unknown_chars']:,} of them unknown{origin}",
        f"{'protocol':<10}{'nats/char':>11}{'bits/char':>11}{'perplexity':>12}{'predicted':>14}",
    ]
    for protocol in ("stream", "windows"):
        s = info[protocol]
        numbers = f"{s['nats_per_char']:>11.4f}{s['bits_per_char']:>11.4f}{s['perplexity']:>12.3f}{s['chars']:>14,}"
        lines.append(f"{protocol:<10}{numbers}")
    return "\n".join(lines)


@dataclass
class Timing:
    """When a generation started, had its model and its first text (perf_counter seconds), and its characters."""

    started: float = field(default_factory=perf_counter)
    loaded: float = 0.0
    first: float = 0.0
    chars: int = 0

    def count(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass the pieces on, counting their characters."""
        for piece in pieces:
            self.first = self.first or perf_counter()
            self.chars += len(piece)
            yield piece

    def report(self, seed: int) -> str:
        """Return the line of --stats."""
        now = perf_counter()
        seconds = now - self.loaded
        return (
            f"seed {seed}; model loaded in {self.loaded - self.started:.3f} s; first text after "
            f"{(self.first or now) - self.loaded:.3f} s; {self.chars:,} characters in {seconds:.3f} s "
            f"({self.chars / seconds:,.0f} characters/s)"
        )
