"""How fast and in how much memory a large text becomes ids on disk, and what training on them costs.

    python -m benchmarks.speed.prepare [--gigabytes 4] [--folder DIR] [--kinds ascii mixed]

Writes the text (`--gigabytes` of it, from a fixed seed), prepares it in a process of its own, looks again with a warm
cache, compares the ids with `Vocab.encode`, reads training batches, and prints a table. Needs some 12 GB of free disk
for 4 GB of text. The memory is the peak of the sum over all processes of their resident sets, sampled every 50 ms.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.machine import machine

BLOCK_CHARS = 1 << 20
BLOCKS = 64  # different ones, which are repeated in random order
SAMPLES = 64
KINDS = ("ascii", "mixed")
BATCH, SEQ_LEN, STEPS = 128, 128, 3000

# Words of a language or sign system, each with its share of the words of a mixed text.
_ALPHABETS = {
    "abcdefghijklmnopqrstuvwxyz": 0.35,
    "абвгдежзийклмнопрстуфхцчшщъыьэюя": 0.25,
    "".join(map(chr, range(0x4E00, 0x4E00 + 3000))): 0.2,
    "".join(map(chr, range(0x3041, 0x3097))): 0.1,
    "àâçéèêëîïôùûüÿñæœßäöå": 0.07,
    "😀😁😂🙃🙏🚀🌍🎉❤👍": 0.03,
}


def block(kind: str, seed: int) -> bytes:
    """About a million characters of words and lines, in UTF-8."""
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
    """A text of `size` bytes or a little more; the blocks come in random order."""
    blocks = [block(kind, seed) for seed in range(BLOCKS)]
    rng, written = np.random.default_rng(0), 0
    with path.open("wb") as file:
        while written < size:
            written += file.write(blocks[rng.integers(BLOCKS)])


# ---- memory


def resident(pid: int) -> int:
    """Bytes of memory that a process and those it has started hold, file pages that they have mapped included."""
    total = 0
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        total = pages * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(resident, map(int, (task / "children").read_text().split())))
    except (OSError, IndexError, ValueError):  # it has just ended
        pass
    return total


@contextmanager
def peak_memory(pid: int, every_s: float = 0.05) -> Iterator[list[int]]:
    """Samples the processes' memory while the block runs; the list's only item is the peak, in bytes."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            peak[0] = max(peak[0], resident(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


# ---- what is measured, each in a process of its own


def prepare_once(text: str, cache: str) -> dict[str, Any]:
    """Seconds that `prepare` takes, its imports apart."""
    from charrnn.config import DataConfig
    from charrnn.data.corpus import prepare

    start = time.perf_counter()
    corpus = prepare(DataConfig(source=text, cache_dir=cache))
    return {
        "seconds": time.perf_counter() - start,
        "num_chars": corpus.num_chars,
        "symbols": len(corpus.vocab),
        "dtype": str(corpus.ids.dtype),
    }


def check_ids(text: str, cache: str) -> dict[str, Any]:
    """Whether the ids of pieces all over the text are those of `Vocab.encode`, and all of them are there."""
    from charrnn.config import DataConfig
    from charrnn.data.corpus import prepare

    corpus = prepare(DataConfig(source=text, cache_dir=cache))
    place, compared = 0, 0
    with Path(text).open(encoding="utf-8", newline="") as file:
        while piece := file.read(BLOCK_CHARS):
            if not np.array_equal(corpus.vocab.encode(piece), corpus.ids[place : place + len(piece)]):
                return {"same": False, "compared": compared}
            place += len(piece)
            compared += len(piece)
    return {"same": place == corpus.num_chars, "compared": compared}


def train(text: str, cache: str) -> dict[str, Any]:
    """Seconds to the first update's end, the input's share of the updates, and how memory grows."""
    begun = time.perf_counter()
    import torch

    from benchmarks.random_text import make_trainer

    imported = time.perf_counter()
    options = {
        "data.source": text,
        "data.cache_dir": cache,
        "data.batch_size": BATCH,
        "data.seq_len": SEQ_LEN,
        "model.embedding_dim": 64,
        "model.hidden_dim": 256,
        "model.num_layers": 2,
        "train.threads": 2,
        "train.mixed_precision": "no",
        "train.run_dir": str(Path(cache, "run")),
    }
    trainer = make_trainer(options)
    trainer.train_step()
    first = time.perf_counter()
    start = time.perf_counter()
    for _ in range(10):
        trainer.train_step()
    step_s = (time.perf_counter() - start) / 10
    before = resident(os.getpid())
    start = time.perf_counter()
    for step in range(STEPS):
        trainer.data.train.windows(trainer.data.plan.batch(step).starts, SEQ_LEN + 1)
    input_s = (time.perf_counter() - start) / STEPS
    return {
        "torch": torch.__version__,
        "import_s": imported - begun,
        "first_step_s": first - imported,
        "step_s": step_s,
        "input_s": input_s,
        "memory_before": before,
        "memory_after": resident(os.getpid()),
    }


_INSIDE = {"prepare": prepare_once, "check": check_ids, "train": train}


def measured(what: str, text: Path, cache: Path) -> dict[str, Any]:
    """Runs one of the functions above in a new process; with the peak of its memory and that of its workers."""
    command = [sys.executable, "-m", "benchmarks.speed.prepare", "--inside", what, str(text), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, peak_memory(process.pid) as peak:
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return {**json.loads(out.splitlines()[-1]), "peak": peak[0]}


def run(kind: str, size: int, folder: Path) -> list[str]:
    """The lines of the table for one kind of text."""
    text, cache = folder / f"{kind}.txt", folder / f"cache-{kind}"
    write_text(text, kind, size)
    time.sleep(3)  # a text that was written less than 2 s ago is read again by whoever comes next
    cold, warm = measured("prepare", text, cache), measured("prepare", text, cache)
    checked, trained = measured("check", text, cache), measured("train", text, cache)
    if not checked["same"]:
        raise SystemExit(f"{kind}: the ids differ from Vocab.encode's after {checked['compared']} characters")
    mega, gib = text.stat().st_size / 1e6, 1 << 20
    growth = (trained["memory_after"] - trained["memory_before"]) / gib
    shutil.rmtree(cache)
    text.unlink()
    return [
        f"| {kind} | {mega:,.0f} MB, {cold['num_chars']:,} characters, {cold['symbols']} different, {cold['dtype']} "
        f"| {cold['seconds']:.1f} s, {mega / cold['seconds']:.0f} MB/s | {cold['peak'] / gib:.0f} MiB "
        f"| {warm['seconds']:.2f} s | {trained['first_step_s']:.2f} s (after {trained['import_s']:.1f} s of imports) "
        f"| {trained['input_s'] / trained['step_s']:.2%} of {trained['step_s'] * 1e3:.0f} ms | {growth:+.0f} MiB |"
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of text, of each kind")
    parser.add_argument("--folder", type=Path, help="where the text and its ids go; default: a temporary one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--inside", nargs=3, metavar=("WHAT", "TEXT", "CACHE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        what, text, cache = chosen.inside
        print(json.dumps(_INSIDE[what](text, cache)))
        return
    on = machine()
    print(f"{on['cpu']}, {on['cores']} cores, {on['time']}; every kind once\n")
    print("| text | size | preparing | peak memory | again | first update | input | memory over the updates |")
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory(dir=chosen.folder, prefix="charrnn-prepare-") as folder:
        for kind in chosen.kinds:
            print("\n".join(run(kind, int(chosen.gigabytes * 1e9), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
