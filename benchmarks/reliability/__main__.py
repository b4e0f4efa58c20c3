"""What training survives: every fault is injected into real runs, and what it cost is counted.

    python -m benchmarks.reliability --times 5
    python -m benchmarks.reliability --only "SIGKILL in a step" --only SIGTERM --times 20

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

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from benchmarks.common import machine_line, markdown, markdown_head, run
from benchmarks.reliability.chains import Trial
from benchmarks.reliability.faults import FAULTS, Fault
from benchmarks.reliability.launch import Workspace

_COLUMNS = ["fault", "how injected", "survived if", "tried", "survived", "characters trained again, mean (max)"]
_COLUMNS += ["checkpoint bytes lost, mean (max)", "seconds until all had ended, mean (max)"]


def row(fault: Fault, trials: Sequence[Trial]) -> str:
    """Formats a fault's row, as docs/reliability.md shows it."""

    def extent(values: Sequence[float], form: str) -> str:
        return f"{fmean(values):{form}} ({max(values):{form}})" if values else "none"

    costs = [trial.cost for trial in trials]
    cells = [fault.name, fault.how, fault.survived_if, len(trials), sum(not trial.wrong for trial in trials)]
    cells += [extent([c.chars for c in costs], ",.0f"), extent([c.unfinished_bytes for c in costs], ",.0f")]
    return markdown([*cells, extent([c.ended_s for c in costs], ".1f")])


def reliability(
    times: Annotated[int, typer.Option(help="Injections of each fault.", min=1)] = 5,
    only: Annotated[list[str] | None, typer.Option(help="A fault's name, or a part of it; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Start of every random choice.", min=0)] = 0,
) -> None:
    """Inject every fault into real training runs, and print what was survived and what it cost."""
    chosen = [f for f in FAULTS if not only or any(part.lower() in f.name.lower() for part in only)]
    if not chosen:
        raise typer.BadParameter(f"no such fault; there are {', '.join(f.name for f in FAULTS)}")
    print("\n".join([f"{machine_line()}; seed {seed}", "", *markdown_head(_COLUMNS, numbers=5)]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for fault in chosen:
            trials = fault.trials(workspace, times, random.Random(f"{seed} {fault.name}"))
            print(row(fault, trials), flush=True)
            for trial in trials:
                if trial.wrong:
                    print(f"{fault.name}: {trial.wrong}", file=sys.stderr)


if __name__ == "__main__":
    run(reliability)
