"""How fast and in how much memory a large text becomes ids on disk.

    python -m benchmarks.speed.prepare [--gigabytes 4] [--folder DIR] [--kind ascii --kind mixed]

Writes the text (`--gigabytes` of it, from a fixed seed), prepares it in a process of its own and again from a warm
cache, and prints a table. Needs some 12 GB of free disk for 4 GB of text. The memory is the peak of the sum of the
resident sets of a process and those that it started, sampled every 50 ms.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.common import machine_line, markdown, markdown_head, run

_BLOCK_CHARS = 1 << 20
_BLOCKS = 64  # different ones, which are repeated in random order
_COLUMNS = ("text", "size", "preparing", "peak memory", "again")
_WORD = 6
# Characters of a language or sign system, each with its share of the words of a mixed text.
_ALPHABETS = {
    "abcdefghijklmnopqrstuvwxyz": 0.35,
    "абвгдежзийклмнопрстуфхцчшщъыьэюя": 0.25,
    "".join(map(chr, range(0x4E00, 0x4E00 + 3000))): 0.2,
    "".join(map(chr, range(0x3041, 0x3097))): 0.1,
    "àâçéèêëîïôùûüÿñæœßäöå": 0.07,
    "😀😁😂🙃🙏🚀🌍🎉❤👍": 0.03,
}


class Kind(StrEnum):
    """Of a text: printable ASCII, or words of several alphabets."""

    ascii = "ascii"
    mixed = "mixed"


def block(kind: Kind, seed: int) -> bytes:
    """Draws about a million characters of words and lines, in UTF-8."""
    rng = np.random.default_rng(seed)
    words = _BLOCK_CHARS // _WORD
    if kind is Kind.ascii:
        drawn = [rng.integers(ord(" "), ord("~") + 1, (words, _WORD))]
    else:
        alphabets = [(np.array([ord(c) for c in a]), int(words * share)) for a, share in _ALPHABETS.items()]
        drawn = [rng.choice(alphabet, (count, _WORD)) for alphabet, count in alphabets]
    codes = np.concatenate(drawn).astype(np.uint32)  # (words, _WORD)
    rng.shuffle(codes)
    codes[:, -1] = np.where(rng.random(len(codes)) < 0.1, ord("\n"), ord(" "))
    return codes.tobytes().decode("utf-32-le").encode()


def write_text(path: Path, kind: Kind, size: int) -> None:
    """Writes `size` bytes of text or a little more, the blocks in random order."""
    blocks = [block(kind, seed) for seed in range(min(_BLOCKS, 1 + size // _BLOCK_CHARS))]
    rng, written = np.random.default_rng(0), 0
    with path.open("wb") as file:
        while written < size:
            written += file.write(blocks[rng.integers(len(blocks))])
    time.sleep(2.5)  # the cache trusts no file that changed within 2 s of being read


def prepare_once(text: str, cache: str) -> dict[str, Any]:
    """Prepares the text; returns the seconds, imports left out."""
    from charrnn.config import DataConfig
    from charrnn.data.corpus import prepare

    start = time.perf_counter()
    corpus = prepare(DataConfig(source=text, cache_dir=cache))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "chars": corpus.num_chars, "symbols": len(corpus.vocab), "dtype": str(corpus.ids.dtype)}


def measured(text: Path, cache: Path) -> dict[str, Any]:
    """Calls `prepare_once` in a new process; adds `peak`, the memory of it and its workers in bytes."""
    code = f"import json, sys; from {__spec__.name} import prepare_once; print(json.dumps(prepare_once(*sys.argv[1:])))"
    peak = 0
    with subprocess.Popen([sys.executable, "-c", code, text, cache], stdout=subprocess.PIPE, text=True) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]))
            time.sleep(0.05)
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"preparing {text} ended with exit code {process.returncode}")
    return {**json.loads(out.splitlines()[-1]), "peak": peak}


def main(
    gigabytes: Annotated[float, typer.Option(help="Of text, of each kind.")] = 4.0,
    folder: Annotated[Path | None, typer.Option(help="Where text and ids go; default: a temporary folder.")] = None,
    kind: Annotated[list[Kind] | None, typer.Option(help="Repeatable. Default: both.")] = None,
) -> None:
    """Print the table, a row as soon as it is known."""
    print(f"{machine_line()}\nmeasured once for each kind\n")
    print("\n".join(markdown_head(_COLUMNS)))
    for name in kind or Kind:
        with tempfile.TemporaryDirectory(dir=folder, prefix="charrnn-prepare-") as place:
            text, cache = Path(place, f"{name}.txt"), Path(place, "cache")
            write_text(text, name, int(gigabytes * 1e9))
            cold, warm = measured(text, cache), measured(text, cache)
            mega = text.stat().st_size / 1e6
        size = f"{mega:,.0f} MB, {cold['chars']:,} characters, {cold['symbols']} different, {cold['dtype']}"
        speed, peak = f"{cold['seconds']:.1f} s, {mega / cold['seconds']:.0f} MB/s", f"{cold['peak'] / 2**20:.0f} MiB"
        print(markdown([name, size, speed, peak, f"{warm['seconds']:.3f} s"]), flush=True)


if __name__ == "__main__":
    run(main)
