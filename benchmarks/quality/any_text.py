"""What one command makes of any text: the recipe against PPMd and against random configurations of the same budget.

    python -m benchmarks.quality.any_text --text shakespeare=tinyshakespeare.txt@400000 \\
        --size 20000 --size 100000 --budget 30 --budget 120 --random 20

For each text and size, the last tenth is what all are scored on: `stream` in nats/char. PPMd (pyppmd, the best of the
orders 3 to 8) is adaptive: it goes on learning from the tenth as it codes it. For `windows` it codes pieces of the
tenth apart, each of 256 characters as in that protocol: what it learns in one is lost to the next. A run's loss is
that of its best checkpoint, fp32, on the complete tenth. Random configurations vary all that the recipe chooses,
weights to start from included. Every line is printed as soon as it is known.
"""

import functools
import itertools
import math
import random
import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.common import machine_line, markdown, markdown_head, run
from benchmarks.training import assigned, run_training
from charrnn.config import EvalConfig

_COLUMNS = ["text", "characters", "budget", "recipe, `stream`", "PPMd", "", "recipe, `windows`", "PPMd, in pieces", ""]
_COLUMNS += ["best of random", "seconds"]
_ORDERS = range(3, 9)
_MEMORY = 64 << 20
_PIECE, _MOST_PIECES = EvalConfig().window, 64


@functools.cache  # of one text for every budget
def ppmd_loss(text: str, held_out: int, encoding: str = "utf-8", *, in_pieces: bool = False) -> float:
    """Nats/char with which PPMd codes the last `held_out` characters after the others, at its best order.

    in_pieces: Code pieces of 256 characters, at most 64 spread over them, each right after the others.
    """
    import pyppmd

    def coded(part: str, order: int) -> int:
        encoder = pyppmd.Ppmd7Encoder(order, _MEMORY)
        return len(encoder.encode(part.encode(encoding)) + encoder.flush())

    others, tenth = text[:-held_out], text[-held_out:]
    pieces = [tenth]
    if in_pieces:
        starts = range(0, held_out, _PIECE * math.ceil(held_out / (_PIECE * _MOST_PIECES)))
        pieces = [tenth[start : start + _PIECE] for start in starts]

    def length(order: int) -> int:
        before = coded(others, order)
        return sum(coded(others + piece, order) - before for piece in pieces)

    return min(map(length, _ORDERS)) * 8 * math.log(2) / sum(map(len, pieces))


# Everything that the recipe chooses but the budget; of a network, where training starts from scratch.
_CHOICES: dict[str, list[Any]] = {
    "optim.weight_decay": [0, 0.01, 0.1],
    "data.batch_size": [4, 8, 16, 32, 64],
    "data.seq_len": [32, 64, 96, 128],
    "data.reset": [0, 0.05],
    "model.dropout_mask": ["window", "character"],
    "train.epochs": [4, 8, 16, 32, 64],
    "train.init_from": ["base", "none"],
}
_NETWORKS: dict[str, list[Any]] = {
    "model.rnn": ["GRU", "LSTM"],
    "model.num_layers": [1, 2],
    "model.hidden_dim": [128, 256, 384, 512, 768],
    "model.embedding_dim": [32, 64, 128],
    "model.layer_norm": ["true", "false"],
}


def random_configuration(draw: random.Random) -> dict[str, Any]:
    """Draws settings, uniform or log-uniform."""
    drawn = {"optim.lr": f"{10 ** draw.uniform(-3.3, -2):.2g}", "model.dropout": round(draw.uniform(0, 0.6), 2)}
    drawn |= {name: draw.choice(values) for name, values in _CHOICES.items()}
    if drawn["train.init_from"] == "base":
        return drawn
    return drawn | {name: draw.choice(values) for name, values in _NETWORKS.items()}


def best_of_random(folder: Path, count: int, *options: object) -> tuple[float, str]:
    """The lowest loss of `count` random configurations, and its settings; those that don't fit the text are redrawn."""
    found: list[tuple[float, str]] = []
    draw = random.Random(0)
    while len(found) < count:
        settings = assigned(random_configuration(draw))
        try:
            metrics = run_training("random", folder / f"random-{len(found)}", *settings, *options)
        except RuntimeError as error:
            if "would fit" not in str(error) and "diverged" not in str(error):
                raise
            continue
        found.append((metrics["val/stream/loss"], " ".join(settings[1::2])))
    return min(found)


def cut(given: str, size: int, encoding: str = "utf-8-sig") -> tuple[str, str]:
    """The name and text of NAME=FILE[@START], `size` characters of it; 0 = all."""
    name, _, place = given.partition("=")
    path, _, start = place.partition("@")
    text = Path(path).read_bytes().decode(encoding).replace("\r\n", "\n")[int(start or 0) :]
    return name, text[: size or None]


def shown(losses: list[float]) -> str:
    """The mean, and the range of several."""
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
    return f"{mean(losses):.4f}{spread}"


def main(
    text: Annotated[list[str], typer.Option(metavar="NAME=FILE[@START]", help="A text, from a character on.")],
    size: Annotated[list[int], typer.Option(help="Characters of each text; 0 = all.")],
    budget: Annotated[list[float], typer.Option(help="Seconds of training.")],
    random_runs: Annotated[int, typer.Option("--random", help="Random configurations for each budget.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = all cores.")] = 0,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of the recipe's runs.")] = None,
    binary: Annotated[bool, typer.Option(help="The files are bytes, not text: data.vocab=bytes.")] = False,
) -> None:
    """Print one line for each text, size and budget."""
    encoding, fixed = ("latin-1", {"data.vocab": "bytes"}) if binary else ("utf-8", {})
    print(f"{machine_line()}\nthreads  {threads or 'all'}\n")
    print("\n".join(markdown_head(_COLUMNS)), flush=True)
    for given, length, seconds in itertools.product(text, size, budget):
        name, content = cut(given, length, "latin-1" if binary else "utf-8-sig")
        held_out = len(content) - int(len(content) * 0.9)
        ppmd, ppmd_in_pieces = (ppmd_loss(content, held_out, encoding, in_pieces=pieces) for pieces in (False, True))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            path = folder / f"{name}.txt"
            path.write_bytes(content.encode(encoding))
            fields = fixed | {"train.threads": threads, "data.cache_dir": folder / "data"}
            options = ["--data", path, "--time-limit", f"{seconds}s", *assigned(fields)]
            runs = [run_training(name, folder / f"seed-{n}", *options, "--set", f"train.seed={n}") for n in seed or [1]]
            best = random_runs and best_of_random(folder, random_runs, *options)
        stream, windows = ([taken[f"val/{protocol}/loss"] for taken in runs] for protocol in ("stream", "windows"))
        cells = [name, f"{len(content):,}", f"{seconds:g} s", shown(stream), f"{ppmd:.4f}"]
        cells += [f"{mean(stream) / ppmd - 1:+.1%}", shown(windows), f"{ppmd_in_pieces:.4f}"]
        cells += [f"{mean(windows) / ppmd_in_pieces - 1:+.1%}", f"{best[0]:.4f} ({best[1]})" if best else ""]
        print(markdown([*cells, f"{max(taken['seconds'] for taken in runs):.0f}"]), flush=True)


if __name__ == "__main__":
    run(main)
