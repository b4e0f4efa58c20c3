"""How fast and in how much memory a large text becomes ids on disk, and what training on them costs.

    python -m benchmarks.speed.prepare [--gigabytes 4] [--folder DIR] [--kind ascii --kind mixed]

Writes the text (`--gigabytes` of it, from a fixed seed), prepares it in a process of its own, prepares it again from a
warm cache, compares the ids with `Vocab.encode`, reads training batches, and prints a table. Needs some 12 GB of free
disk for 4 GB of text. The memory is the peak of the sum of the resident sets of a process and those that it started,
sampled every 50 ms.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.common import machine_line, markdown, markdown_head, run, seconds_of

BLOCK_CHARS = 1 << 20
BLOCKS = 64  # different ones, which are repeated in random order
KINDS = ("ascii", "mixed")
BATCH_SIZE, SEQ_LEN, STEPS = 128, 128, 3000
COLUMNS = ("text", "size", "preparing", "peak memory", "again", "first step", "input", "memory over the steps")

# Characters of a language or sign system, each with its share of the words of a mixed text.
_ALPHABETS = {
    "abcdefghijklmnopqrstuvwxyz": 0.35,
    "абвгдежзийклмнопрстуфхцчшщъыьэюя": 0.25,
    "".join(map(chr, range(0x4E00, 0x4E00 + 3000))): 0.2,
    "".join(map(chr, range(0x3041, 0x3097))): 0.1,
    "àâçéèêëîïôùûüÿñæœßäöå": 0.07,
    "😀😁😂🙃🙏🚀🌍🎉❤👍": 0.03,
}


def block(kind: str, seed: int) -> bytes:
    """Draws about a million characters of words and lines, in UTF-8."""
    rng = np.random.default_rng(seed)
    words = BLOCK_CHARS // 6
    if kind == "ascii":
        letters = rng.integers(ord(" "), ord("~") + 1, BLOCK_CHARS, np.uint8)
        letters[rng.integers(0, BLOCK_CHARS, BLOCK_CHARS // 60)] = ord("\n")
        return letters.tobytes()
    alphabets = [np.array(list(a)) for a in _ALPHABETS]
    chosen = rng.choice(len(alphabets), words, p=list(_ALPHABETS.values()))
    ends = np.where(rng.random(words) < 0.1, "\n", " ")
    lengths = np.where(chosen == len(alphabets) - 1, 1, rng.integers(2, 9, words))
    drawn = [iter("".join(rng.choice(a, int(lengths[chosen == i].sum())))) for i, a in enumerate(alphabets)]
    text = "".join(
        "".join(next(drawn[c]) for _ in range(n)) + end for c, n, end in zip(chosen, lengths, ends, strict=True)
    )
    return text.encode()


def write_text(path: Path, kind: str, size: int) -> None:
    """Writes `size` bytes of text or a little more, the blocks in random order."""
    blocks = [block(kind, seed) for seed in range(min(BLOCKS, 1 + size // BLOCK_CHARS))]
    rng, written = np.random.default_rng(0), 0
    with path.open("wb") as file:
        while written < size:
            written += file.write(blocks[rng.integers(len(blocks))])
    settled = time.time() - 60  # the cache trusts no file that changed within the last seconds
    os.utime(path, (settled, settled))


@contextmanager
def peak_memory(pid: int, every_s: float = 0.05) -> Iterator[list[int]]:
    """Samples the memory of a process and its descendants while the block runs; yields [peak in bytes]."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                peak[0] = max(peak[0], sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


# ---- measurements, each in a process of its own


def prepare_once(text: str, cache: str) -> dict[str, Any]:
    """Prepares the text; returns the seconds, imports left out."""
    from charrnn.config import DataConfig
    from charrnn.data.corpus import prepare

    start = time.perf_counter()
    corpus = prepare(DataConfig(source=text, cache_dir=cache))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "chars": corpus.num_chars, "symbols": len(corpus.vocab), "dtype": str(corpus.ids.dtype)}


def check(text: str, cache: str) -> dict[str, Any]:
    """Compares all ids with `Vocab.encode` of the text, piece by piece."""
    from charrnn.config import DataConfig
    from charrnn.data.corpus import prepare

    corpus = prepare(DataConfig(source=text, cache_dir=cache))
    compared = 0
    with Path(text).open(encoding="utf-8", newline="") as file:
        while piece := file.read(BLOCK_CHARS):
            if not np.array_equal(corpus.vocab.encode(piece), corpus.ids[compared : compared + len(piece)]):
                return {"same": False, "compared": compared}
            compared += len(piece)
    return {"same": compared == corpus.num_chars, "compared": compared}


def train(text: str, cache: str) -> dict[str, Any]:
    """Measures the seconds to the end of the first step, the input's share of a step, and how memory grows."""
    begun = time.perf_counter()
    from benchmarks.training import make_trainer, options_of
    from charrnn.config import load_config

    imported = time.perf_counter()
    size = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "embedding_dim": 64, "hidden_dim": 256, "num_layers": 2}
    options = options_of(Path(cache), **size) | {"data.source": text, "data.cache_dir": cache, "train.threads": 2}
    trainer = make_trainer(load_config(None, options))
    trainer.train_step()
    first = time.perf_counter()
    step_s = seconds_of(trainer.train_step, 5) / 5
    process = psutil.Process()
    before = process.memory_info().rss

    def read_batches() -> None:
        for step in range(STEPS):
            trainer.data.train.windows(trainer.data.plan.batch(step).starts, SEQ_LEN + 1)

    input_s = seconds_of(read_batches) / STEPS
    growth = process.memory_info().rss - before
    seconds = {"import_s": imported - begun, "first_step_s": first - imported, "step_s": step_s, "input_s": input_s}
    return {**seconds, "growth": growth}


def measured(what: str, text: Path, cache: Path) -> dict[str, Any]:
    """Calls one of the functions above in a new process; adds `peak`, the memory of it and its workers in bytes."""
    code = f"import json, sys; from {__spec__.name} import {what}; print(json.dumps({what}(*sys.argv[1:])))"
    command = [sys.executable, "-c", code, str(text), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, peak_memory(process.pid) as peak:
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{what} of {text} ended with exit code {process.returncode}")
    return {**json.loads(out.splitlines()[-1]), "peak": peak[0]}


def row(kind: str, size: int, folder: Path) -> str:
    """Measures one kind of text; returns its row of the table."""
    text, cache = folder / f"{kind}.txt", folder / "cache"
    write_text(text, kind, size)
    cold, warm = measured("prepare_once", text, cache), measured("prepare_once", text, cache)
    checked, trained = measured("check", text, cache), measured("train", text, cache)
    if not checked["same"]:
        raise SystemExit(f"{kind}: the ids differ from Vocab.encode's after {checked['compared']} characters")
    mega, gib = text.stat().st_size / 1e6, 1 << 20
    cells = [kind, f"{mega:,.0f} MB, {cold['chars']:,} characters, {cold['symbols']} different, {cold['dtype']}"]
    cells += [f"{cold['seconds']:.1f} s, {mega / cold['seconds']:.0f} MB/s", f"{cold['peak'] / gib:.0f} MiB"]
    cells += [f"{warm['seconds']:.2f} s"]
    cells += [f"{trained['first_step_s']:.2f} s (after {trained['import_s']:.1f} s of imports)"]
    cells += [f"{trained['input_s'] / trained['step_s']:.2%} of {trained['step_s'] * 1e3:.0f} ms"]
    return markdown([*cells, f"{trained['growth'] / gib:+.0f} MiB"])


def main(
    gigabytes: Annotated[float, typer.Option(help="Of text, of each kind.")] = 4.0,
    folder: Annotated[Path | None, typer.Option(help="Where text and ids go; default: a temporary folder.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="ascii or mixed; repeatable. Default: both.")] = None,
) -> None:
    """Print the table, a row as soon as it is known."""
    if unknown := set(kind or ()) - set(KINDS):
        raise typer.BadParameter(f"--kind {unknown.pop()}; there are {' and '.join(KINDS)}")
    print(machine_line())
    print("measured once for each kind\n")
    print("\n".join(markdown_head(COLUMNS)))
    for name in kind or KINDS:
        with tempfile.TemporaryDirectory(dir=folder, prefix="charrnn-prepare-") as place:
            print(row(name, int(gigabytes * 1e9), Path(place)), flush=True)


if __name__ == "__main__":
    run(main)
