"""What each choice of a recipe contributes: one run with it and one without, at equal steps and at equal time.

    python -m benchmarks.quality.ablations --config configs/shakespeare.yaml --data tinyshakespeare --steps 1000 \\
        --vary linear:optim.schedule=linear --vary "wide:model.hidden_dim=640 optim.lr=0.006"

Runs of a given number of steps end the same however busy the machine is. The cost of a step is measured apart, the
variants in turns within one process; "at equal time" is a second run, of as many steps as the base's time allows.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import in_turns, machine_line, markdown, markdown_head, ratios, run, seconds_of

ROOT = Path(__file__).resolve().parents[2]
_SAME_COST = 0.03  # a step within 3% of the base's: no second run
_COLUMNS = ("variant", "cost of a step", "windows, equal steps", "stream", "windows, equal time", "stream")


@dataclass(frozen=True)
class Variant:
    """A name, and what `--set` changes of the base; several changes are separated by blanks."""

    name: str
    assignments: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parses NAME:section.key=value section.key=value."""
        name, _, changes = text.partition(":")
        return cls(name, tuple(changes.split()))


@dataclass(frozen=True)
class Base:
    """What all runs share. threads: of a process, 0 = all cores."""

    config: Path
    data: str
    threads: int
    seed: int

    def assignments(self, variant: Variant, steps: int) -> list[str]:
        """Returns every --set of one run."""
        fixed: dict[str, Any] = {"data.source": self.data, "train.threads": self.threads, "train.seed": self.seed}
        fixed |= {"train.max_steps": steps, "train.epochs": 0, "train.time_limit": 0}
        fixed |= {"eval.every": 0, "checkpoint.every": 0, "sample.length": 0}
        return [f"{key}={value}" for key, value in fixed.items()] + list(variant.assignments)


def losses(base: Base, variant: Variant, steps: int, folder: Path) -> dict[str, float]:
    """Trains, and returns the metrics of the last evaluation, in nats/char."""
    run_dir = folder / f"{variant.name}-{steps}"
    command = [sys.executable, "train/main.py", "--config", str(base.config.resolve()), "--run-dir", str(run_dir)]
    command += [word for assignment in base.assignments(variant, steps) for word in ("--set", assignment)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{variant.name}: {' '.join(command)} ended with {ran.returncode}: {ran.stderr[-2000:]}")
    metrics: dict[str, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics |= json.loads(line)
    return metrics


def step_costs(base: Base, variants: list[Variant], rounds: int, steps: int) -> dict[str, float]:
    """Returns each variant's time for a step as a share of the first's: medians over rounds."""
    from benchmarks.training import make_trainer
    from charrnn.config import load_config

    def timed(variant: Variant) -> Any:
        trainer = make_trainer(load_config(base.config, {}, base.assignments(variant, 10**6)))
        return lambda: seconds_of(trainer.train_step, steps)

    taken = in_turns({v.name: timed(v) for v in variants}, rounds, warmup=1)
    return {name: ratios(seconds, taken[variants[0].name]).median for name, seconds in taken.items()}


def row(name: str, cost: float, metrics: dict[str, float], first: dict[str, float], timed: dict[str, float]) -> str:
    """Formats a row of the table; differences from the base in brackets."""

    def cell(values: dict[str, float], protocol: str) -> str:
        loss = values[f"val/{protocol}/loss"]
        return f"{loss:.4f} ({loss - first[f'val/{protocol}/loss']:+.4f})"

    cells = [cell(values, protocol) for values in (metrics, timed) for protocol in ("windows", "stream")]
    return markdown([name, f"{cost:.2f}", *cells])


def main(
    config: Annotated[Path, typer.Option(help="The base.")],
    data: Annotated[str, typer.Option(help="The corpus.")] = "tinyshakespeare",
    vary: Annotated[list[str] | None, typer.Option(help="NAME:section.key=value [section.key=value ...]")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the base.")] = 1000,
    threads: Annotated[int, typer.Option(help="Of a run; 0 = all cores.")] = 0,
    seed: Annotated[int, typer.Option(help="Of every run.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds in which the cost of a step is measured.")] = 5,
) -> None:
    """Print the table, a row as soon as it is known."""
    base = Base(config, data, threads, seed)
    variants = [Variant("base"), *map(Variant.parse, vary or [])]
    print(machine_line())
    print(f"base     {config.name} on {data}, {steps} steps, seed {seed}; nats/char, differences from the base\n")
    print("\n".join(markdown_head(_COLUMNS)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        costs = step_costs(base, variants, rounds, 5)
        first: dict[str, float] = {}
        for variant in variants:
            metrics, cost = losses(base, variant, steps, Path(folder)), costs[variant.name]
            first = first or metrics
            affordable = steps if abs(cost - 1) < _SAME_COST else max(1, round(steps / cost))
            timed = metrics if affordable == steps else losses(base, variant, affordable, Path(folder))
            print(row(variant.name, cost, metrics, first, timed), flush=True)


if __name__ == "__main__":
    run(main)
