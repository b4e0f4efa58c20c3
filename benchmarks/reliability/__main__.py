"""What training survives: every fault is injected into real runs, and what it cost is counted.

    python -m benchmarks.reliability --times 5
    python -m benchmarks.reliability --only "SIGKILL in a step" --only truncated --times 20 --json

How it is measured. A fault interrupts a run, the same command resumes it, the next fault interrupts it, and so on;
every 12 faults it runs to its end, and another run begins. It makes 300 steps of an LSTM with dropout and a carried
state, on a text of 6,000 characters, with a checkpoint every 2 steps, an evaluation every 3 and a line of the log each.
A fault of one process of several strikes one of two, drawn at random. `survived` means that all of this holds:

  * the run's end is that of a run without faults, bit for bit: the weights, the optimizer, the carried state and the
    random generators of the last checkpoint, the weights of the best one, and each loss, gradient norm, learning rate
    and sample of the log, every step once;
  * what the fault's row says under "survived if" came of it: exit codes and messages, within 20 s;
  * no more was lost than the steps between two checkpoints, and those of the checkpoint that was being written (4
    here); nothing at all where the run was asked to stop.

A random point is a line of the project's code that runs in the named function, in a random call.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.common import machine, machine_line, markdown, markdown_head, run
from benchmarks.reliability.faults import FAULTS, Fault, Trial
from benchmarks.reliability.harness import Workspace

_COLUMNS = ["fault", "how injected", "survived if", "tried", "survived", "characters trained again, mean (max)"]
_COLUMNS += ["checkpoint bytes lost, mean (max)", "seconds until all had ended, mean (max)"]


def row(fault: Fault, trials: Sequence[Trial], seconds: float) -> dict[str, Any]:
    """Summarises a fault's trials."""
    costs = [trial.cost for trial in trials]
    return {
        "fault": fault.name,
        "how": fault.how,
        "survived_if": fault.survived_if,
        "tried": len(trials),
        "survived": sum(not trial.wrong for trial in trials),
        "chars_again": _extent([cost.chars for cost in costs]),
        "checkpoint_bytes": _extent([cost.checkpoint_bytes for cost in costs]),
        "ended_s": _extent([cost.ended_s for cost in costs if cost.ended_s is not None]),
        "wrong": [trial.wrong for trial in trials if trial.wrong],
        "seconds": round(seconds, 1),
    }


def _extent(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": fmean(values), "max": max(values)} if values else None


def table(report: dict[str, Any]) -> str:
    """Formats the report as docs/reliability.md shows it."""

    def cell(extent: dict[str, float] | None, form: str) -> str:
        return f"{extent['mean']:{form}} ({extent['max']:{form}})" if extent else "none"

    lines = [f"{machine_line(report['machine'])}; seed {report['seed']}", "", *markdown_head(_COLUMNS, numbers=5)]
    for r in report["rows"]:
        cells = [r["fault"], r["how"], r["survived_if"], r["tried"], r["survived"], cell(r["chars_again"], ",.0f")]
        lines.append(markdown([*cells, cell(r["checkpoint_bytes"], ",.0f"), cell(r["ended_s"], ".1f")]))
    return "\n".join(lines)


def reliability(
    times: Annotated[int, typer.Option(help="Injections of each fault.", min=1)] = 5,
    only: Annotated[list[str] | None, typer.Option(help="A fault's name, or a part of it; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Start of every random choice.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Inject every fault into real training runs, and print what was survived and what it cost."""
    chosen = [f for f in FAULTS if not only or any(part.lower() in f.name.lower() for part in only)]
    if not chosen:
        raise typer.BadParameter(f"no such fault; there are {', '.join(f.name for f in FAULTS)}")
    report: dict[str, Any] = {"machine": machine(), "seed": seed, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for fault in chosen:
            began = time.monotonic()
            trials = fault.trials(workspace, times, random.Random(f"{seed} {fault.name}"))
            report["rows"].append(row(fault, trials, time.monotonic() - began))
            print(f"{fault.name}: {report['rows'][-1]['survived']} of {len(trials)}", file=sys.stderr)
            for wrong in report["rows"][-1]["wrong"]:
                print(f"  {wrong}", file=sys.stderr)
    print(json.dumps(report) if as_json else table(report))


if __name__ == "__main__":
    run(reliability)
