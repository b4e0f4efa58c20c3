"""`python -m charrnn.data inspect DATA`: statistics of a corpus, before a model is trained on it. No torch."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from charrnn.cli import run_command
from charrnn.config import DataConfig, load_config
from charrnn.data.corpus import Corpus, find_parts, prepare
from charrnn.data.stats import count_lines, entropies
from charrnn.log import configure_logging
from charrnn.windows import SPLITS, largest_batch

_CHUNK = 1 << 24
_SHOWN_SYMBOLS = 24
_BAR = 40

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _corpus() -> None:
    """Describe a corpus as training will read it."""


@app.command()
def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, glob, URL or name, as --data takes it.")],
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Config file whose data section applies.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set any field; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print size, lines, symbols, split, entropies and duplicates of a corpus."""
    chosen = load_config(config, {"data.source": data}, assignments or ())
    facts = describe(chosen.data, prepare(chosen.data))
    print(json.dumps(facts) if as_json else as_text(facts))


def describe(data: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """Return the statistics of a corpus, prepared from `data`, as a JSON object."""
    vocab = corpus.vocab
    counts = np.zeros(len(vocab), np.int64)  # (V,)
    for start in range(0, corpus.num_chars, _CHUNK):
        counts += np.bincount(corpus.ids[start : start + _CHUNK], minlength=len(vocab))
    newline = vocab.encode("\n", unknown="skip")
    found = entropies(corpus.ids, len(vocab))
    parts = (corpus.train, corpus.val, corpus.test)
    order = np.argsort(-counts, kind="stable").tolist()
    return {
        "name": corpus.name,
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": corpus.num_chars,
        "vocab": {"kind": vocab.kind, "size": len(vocab)},
        "alphabet": {_symbol(corpus, i): int(counts[i]) for i in order if counts[i]},
        "split": {name: len(ids) for name, ids in zip(SPLITS, parts, strict=True)},
        "largest_batch": largest_batch(len(corpus.train), data.seq_len, data.windows, data.stride),
        "entropy": {"bits_per_char": list(found.bits), "counted": found.counted},
        "lines": count_lines(corpus.ids, int(newline[0]) if len(newline) else None),
        "documents": _document_facts(data),
        "notes": list(corpus.notes),
    }


def _symbol(corpus: Corpus, index: int) -> str:
    return f"0x{index:02x}" if corpus.vocab.kind == "bytes" else corpus.vocab.symbols[index]


def _document_facts(data: DataConfig) -> dict[str, int] | None:
    """Count files, archive members and records, and those equal to an earlier one; None for standard input."""
    if data.source == "-":
        return None
    count, seen = 0, set()
    for part in find_parts(data).parts:
        documents = ([text.encode()] for text in part.documents()) if part.documents else [part.chunks()]
        for document in documents:
            digest = hashlib.sha256()
            for chunk in document:
                digest.update(chunk)
            count += 1
            seen.add(digest.digest())
    return {"count": count, "repeated": count - len(seen)}


def as_text(facts: dict[str, Any]) -> str:
    """Format the statistics, with histograms."""
    n, lines, split = facts["characters"], facts["lines"], facts["split"]
    entropy, vocab, documents = facts["entropy"], facts["vocab"], facts["documents"]
    unit = "bytes" if vocab["kind"] == "bytes" else "characters"
    counted = "" if entropy["counted"] == n else f", counted on {entropy['counted']:,} of them"
    seen = "" if lines["compared"] == lines["count"] else f", of the first {lines['compared']:,} lines"
    share = lines["repeated_chars"] / n
    out = [
        f"corpus     {facts['name']}: {n:,} {unit}, {len(facts['alphabet'])} different, vocabulary {vocab['size']:,}",
        f"sha256     {facts['sha256']}",
        "split      " + ", ".join(f"{name} {size:,}" for name, size in split.items()),
        f"batches    at this seq_len, batch_size may be up to {facts['largest_batch']:,}",
        f"lines      {lines['count']:,}; the longest, line {lines['longest_at']:,}, has {lines['longest']:,} {unit}",
        f"repeated   {lines['repeated']:,} of {lines['not_empty']:,} lines that are not empty occurred before: "
        f"{share:.1%} of the text{seen}",
    ]
    if documents and documents["count"] > 1:
        out.append(f"documents  {documents['count']:,}; {documents['repeated']:,} equal an earlier one")
    out += [f"entropy    order {k}: {bits:.4f} bits/char" for k, bits in enumerate(entropy["bits_per_char"])]
    out.append(f"           by the text's own frequencies{counted}: for a small text the higher orders are too low")
    shown = dict(list(facts["alphabet"].items())[:_SHOWN_SYMBOLS])
    left = len(facts["alphabet"]) - len(shown)
    out += ["", f"{unit}" + (f", {left:,} rarer ones not shown (--json has all)" if left else "")]
    out += _bars({name if unit == "bytes" else repr(name): count for name, count in shown.items()})
    out += ["", "line lengths", *_bars(lines["lengths"])]
    return "\n".join(out)


def _bars(counts: dict[str, int]) -> list[str]:
    most, wide = max(counts.values()), max(map(len, counts))
    return [f"{name:>{wide + 2}} {count:>13,} {'#' * -(-count * _BAR // most)}" for name, count in counts.items()]


def main() -> None:
    """Run `python -m charrnn.data`."""
    configure_logging()
    run_command(app)
