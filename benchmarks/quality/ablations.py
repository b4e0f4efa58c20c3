"""What each choice of a recipe contributes: one run with it and one without, at equal steps and at equal time.

    python -m benchmarks.quality.ablations --config configs/shakespeare.yaml --data tinyshakespeare --steps 1000 \\
        --vary linear:optim.schedule=linear --vary "wide:model.hidden_dim=640 optim.lr=0.006"

Runs of a given number of steps end the same however busy the machine is. The cost of a step is measured apart, the
variants in turns within one process; "at equal time" is a second run, of as many steps as the base's time allows.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import in_turns, machine_line, markdown, markdown_head, ratios, run, seconds_of
from benchmarks.training import assigned, make_trainer, run_training
from charrnn.config import load_config

_SAME_COST = 0.03  # a step within 3% of the base's: no second run
_COLUMNS = ("variant", "cost of a step", "windows, equal steps", "stream", "windows, equal time", "stream")

Fields = dict[str, Any]  # "section.key" -> value


def parse(text: str) -> tuple[str, Fields]:
    """Parses NAME:section.key=value section.key=value; a variant is a name and what it changes of the base."""
    name, _, changes = text.partition(":")
    return name, dict(change.split("=", 1) for change in changes.split())


def step_costs(config: Path, variants: dict[str, Fields], rounds: int, steps: int) -> dict[str, float]:
    """Returns each variant's time for a step as a share of the first's: medians over rounds."""

    def timed(fields: Fields) -> Any:
        trainer = make_trainer(load_config(config, {}, assigned(fields)[1::2]))
        return lambda: seconds_of(trainer.train_step, steps)

    taken = in_turns({name: timed(fields) for name, fields in variants.items()}, rounds, warmup=1)
    base = next(iter(taken.values()))
    return {name: ratios(seconds, base).median for name, seconds in taken.items()}


def row(name: str, cost: float, metrics: Fields, first: Fields, timed: Fields) -> str:
    """Formats a row of the table; differences from the base in brackets."""
    cells = []
    for values in (metrics, timed):
        for loss in ("val/windows/loss", "val/stream/loss"):
            cells.append(f"{values[loss]:.4f} ({values[loss] - first[loss]:+.4f})")
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
    fixed = {"data.source": data, "train.threads": threads, "train.seed": seed, "train.max_steps": 10**6}
    fixed |= {"train.epochs": 0, "train.time_limit": 0, "eval.every": 0, "checkpoint.every": 0, "sample.length": 0}
    variants = {name: fixed | changes for name, changes in [("base", {}), *map(parse, vary or [])]}
    print(machine_line())
    print(f"base     {config.name} on {data}, {steps} steps, seed {seed}; nats/char, differences from the base\n")
    print("\n".join(markdown_head(_COLUMNS)), flush=True)
    with tempfile.TemporaryDirectory() as folder:

        def trained(name: str, count: int) -> Fields:
            fields = variants[name] | {"train.max_steps": count}
            return run_training(name, Path(folder, f"{name}-{count}"), "--config", config.resolve(), *assigned(fields))

        costs = step_costs(config, variants, rounds, 5)
        first: Fields = {}
        for name, cost in costs.items():
            metrics = trained(name, steps)
            first = first or metrics
            affordable = steps if abs(cost - 1) < _SAME_COST else max(1, round(steps / cost))
            timed = metrics if affordable == steps else trained(name, affordable)
            print(row(name, cost, metrics, first, timed), flush=True)


if __name__ == "__main__":
    run(main)
