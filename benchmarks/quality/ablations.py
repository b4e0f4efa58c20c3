"""What each choice of a recipe gives: one run with it and one without, at equal steps and at equal time.

    python -m benchmarks.quality.ablations --config configs/shakespeare.yaml --data tinyshakespeare --steps 1000 \\
        --vary linear:optim.schedule=linear --vary "wide:model.hidden_dim=640 optim.lr=0.006"

Runs of a given number of steps end the same however busy the machine is. What a step costs is measured apart, the
variants in turns within one process; "at equal time" is a second run, of as many steps as the base's time allows.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[2]
_SAME_COST = 0.03  # a step within 3% of the base's: no second run


@dataclass(frozen=True)
class Variant:
    """A name, and what `--set` changes of the base; several changes are separated by blanks."""

    name: str
    assignments: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Reads NAME:section.key=value section.key=value."""
        name, _, changes = text.partition(":")
        return cls(name, tuple(changes.split()))


@dataclass(frozen=True)
class Base:
    """What all runs share. steps: of the base. threads: of a process, 0 = all cores."""

    config: Path
    data: str
    steps: int
    threads: int
    seed: int

    def assignments(self, variant: Variant, steps: int) -> list[str]:
        """Every --set of one run."""
        fixed = {
            "data.source": self.data,
            "train.epochs": 0,
            "train.time_limit": 0,
            "train.max_steps": steps,
            "train.threads": self.threads,
            "train.seed": self.seed,
            "eval.every": 0,
            "checkpoint.every": 0,
            "sample.length": 0,
        }
        return [f"{key}={value}" for key, value in fixed.items()] + list(variant.assignments)


def losses(base: Base, variant: Variant, steps: int, folder: Path) -> dict[str, float]:
    """Trains, and returns the figures of the last evaluation, in nats/char."""
    run_dir = folder / f"{variant.name}-{steps}"
    command = [sys.executable, "train/main.py", "--config", str(base.config.resolve()), "--run-dir", str(run_dir)]
    for assignment in base.assignments(variant, steps):
        command += ["--set", assignment]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{variant.name}: {' '.join(command)} ended with {ran.returncode}: {ran.stderr[-2000:]}")
    figures: dict[str, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        figures |= json.loads(line)
    return figures


def step_costs(base: Base, variants: list[Variant], folder: Path, rounds: int, steps: int) -> dict[str, float]:
    """Each variant's time for a step as a share of the first's: medians over rounds in which they take turns."""
    from charrnn.config import load_config
    from charrnn.data.corpus import prepare
    from train.checkpoint.vocab_transfer import StartingPoint
    from train.distributed.setup import make_accelerator, set_threads
    from train.tracking.recorder import Recorder
    from train.trainer import Trainer

    trainers = {}
    for variant in variants:
        config = load_config(base.config, {}, base.assignments(variant, 10**6))
        set_threads(config.train.threads)
        corpus = prepare(config.data)
        start = StartingPoint(corpus.vocab)
        run_dir = folder / f"cost-{variant.name}"
        trainers[variant.name] = Trainer(config, corpus, start, make_accelerator(config.train), run_dir, Recorder())
    ratios: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):  # the first warms up
        times = {}
        for name, trainer in trainers.items():
            began = time.perf_counter()
            for _ in range(steps):
                trainer.train_step()
            times[name] = time.perf_counter() - began
        for name in ratios if number else ():
            ratios[name].append(times[name] / times[variants[0].name])
    return {name: statistics.median(values) for name, values in ratios.items()}


def row(name: str, cost: float, figures: dict[str, float], first: dict[str, float], timed: dict[str, float]) -> str:
    """A line of the table; differences from the base in brackets."""

    def cell(values: dict[str, float], protocol: str) -> str:
        loss = values[f"val/{protocol}/loss"]
        return f"{loss:.4f} ({loss - first[f'val/{protocol}/loss']:+.4f})"

    cells = [cell(v, protocol) for v in (figures, timed) for protocol in ("windows", "stream")]
    return f"| {name} | {cost:.2f} | " + " | ".join(cells) + " |"


def main(
    config: Annotated[Path, typer.Option(help="The base.")],
    data: Annotated[str, typer.Option(help="The corpus.")] = "tinyshakespeare",
    vary: Annotated[list[str] | None, typer.Option(help="NAME:section.key=value [section.key=value ...]")] = None,
    steps: Annotated[int, typer.Option(help="Updates of the base.")] = 1000,
    threads: Annotated[int, typer.Option(help="Of a run; 0 = all cores.")] = 0,
    seed: Annotated[int, typer.Option(help="Of every run.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds in which the cost of a step is measured.")] = 5,
) -> None:
    """Print the table, a row as soon as it is known."""
    base = Base(config, data, steps, threads, seed)
    variants = [Variant("base"), *map(Variant.parse, vary or [])]
    about = machine()
    print(f"machine  {about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['time']}")
    print(f"base     {config.name} on {data}, {steps} steps, seed {seed}; nats/char, differences from the base\n")
    print("| variant | cost of a step | windows, equal steps | stream | windows, equal time | stream |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        costs = step_costs(base, variants, folder, rounds, 5)
        first: dict[str, float] = {}
        for variant in variants:
            figures = losses(base, variant, steps, folder)
            first = first or figures
            cost = costs[variant.name]
            affordable = steps if abs(cost - 1) < _SAME_COST else max(1, round(steps / cost))
            timed = figures if affordable == steps else losses(base, variant, affordable, folder)
            print(row(variant.name, cost, figures, first, timed), flush=True)


if __name__ == "__main__":
    typer.run(main)
