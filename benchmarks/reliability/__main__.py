"""What training survives: every fault is injected into real runs, and what it cost is counted.

    python -m benchmarks.reliability --times 5
    python -m benchmarks.reliability --only "SIGKILL in a step" --only truncated --times 20 --json

How it is measured. A run is struck by a fault, started again by the same command, struck again, and so on; every 12
faults it goes on to its end, and another run begins. It makes 300 updates of an LSTM with dropout and a carried state,
on a text of 6,000 characters, with a checkpoint every 2 updates, an evaluation every 3 and a line of the log each. What
befalls one process of several befalls one of two, drawn at random. `survived` means that all of this holds:

  * the run's end is that of a run that met no fault, bit for bit: the weights, the optimizer, the carried state and the
    random generators of the last checkpoint, the weights of the best one, and each loss, gradient norm, learning rate
    and sample of the log, every update once;
  * what the fault's row says under "survived if" came of it: exit codes and words, within 20 s;
  * no more was lost than the updates between two checkpoints, and those of the checkpoint that was being written (4
    here); nothing at all where the run was asked to stop.

A point drawn at random is a line of the project's code that runs in the named function, in a call drawn at random.
"""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.common import machine
from benchmarks.reliability.faults import (
    Blow,
    Draw,
    Trial,
    chain,
    chain_of_restarts,
    claim_lock,
    donate,
    drawn_fault,
    file_limit,
    flip,
    full_disk,
    kill_anywhere,
    kill_in,
    kill_launcher,
    kill_rank,
    remove_file,
    second_interrupt,
    spoil_all,
    stop_rank,
    stop_signal,
    tampered,
    truncate,
    wrong_batch,
    wrong_number,
)
from benchmarks.reliability.runs import Damage, Runs, outcome
from charrnn.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR

BLOWS_A_RUN = 12
_DISK_MIB = 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Kind:
    """A row of the table. how: it is injected. meant: what must come of it, besides the end that all share.

    trials: (a name for run folders, where runs are, how many, where chance comes from) -> what came of each; none where
    this machine does not permit it.
    """

    name: str
    how: str
    meant: str
    trials: Callable[[str, Runs, int, Draw], list[Trial]]


# ---- how a fault is tried several times


def chained(blow: Callable[[Draw], Blow], processes: int, name: str, runs: Runs, times: int, draw: Draw) -> list[Trial]:
    """A blow a launch."""
    return in_runs_of(lambda run, blows: chain(runs, run, blows, processes), blow, name, times, draw)


def restarted(launcher: str, name: str, runs: Runs, times: int, draw: Draw) -> list[Trial]:
    """A rank of two is killed, all times in one launch."""
    return in_runs_of(lambda run, blows: chain_of_restarts(runs, run, blows, launcher), kill_rank, name, times, draw)


def on_small_disk(blow: Callable[[Draw], Blow], name: str, runs: Runs, times: int, draw: Draw) -> list[Trial]:
    """A blow a launch, of runs on a disk of their own; none where mounting one is not permitted."""
    with small_disk(runs.folder / "disk") as mounted:
        if not mounted:
            return []
        return in_runs_of(lambda run, blows: chain(runs, f"disk/{run}", blows), blow, name, times, draw)


def in_runs_of(
    strike_run: Callable[[str, list[Blow]], list[Trial]],
    blow: Callable[[Draw], Blow],
    name: str,
    times: int,
    draw: Draw,
) -> list[Trial]:
    """`times` blows, BLOWS_A_RUN a run."""
    trials: list[Trial] = []
    while len(trials) < times:
        blows = [blow(draw) for _ in range(min(BLOWS_A_RUN, times - len(trials)))]
        trials += strike_run(f"{name}-{len(trials)}", blows)
    return trials


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a small disk while the block runs, if that is permitted. Yields: whether it was."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "charrnn", str(folder)]
    try:
        mounted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def second_runs(name: str, runs: Runs, times: int, draw: Draw) -> list[Trial]:
    """One run waits at a point of an update, others are started on its folder, and it goes on to its end."""
    first = runs.start(name, [drawn_fault("pause", "step", draw)])
    first.wait_for(lambda: bool(first.happened("fault")))
    tried = []
    for _ in range(times):
        began = time.monotonic()
        second = subprocess.run(
            runs.command(name), cwd=runs.folder, env=runs.environment(), capture_output=True, text=True, check=False
        )
        said = f"another run trains in {name} (process {first.process.pid} on "
        refused = second.returncode == EXIT_USER_ERROR and said in second.stderr
        wrong = "" if refused else f"it left with {second.returncode}: {second.stderr}"
        tried.append((wrong, time.monotonic() - began))
    (runs.folder / "release").touch()
    whole = first.said if first.wait() else ""
    if not whole and outcome(runs.run_dir(name)) != runs.unharmed(1):
        whole = "the first run's end is not that of a run alone"
    return [Trial(Damage(ended_s=seconds), wrong or whole) for wrong, seconds in tried]


# ---- every fault there is


def kinds() -> list[Kind]:
    """In the table's order."""
    return [*kills(), *stops(), *disks(), *tamperings(), *strangers(), *wrong_numbers()]


def of_runs(name: str, how: str, meant: str, blow: Callable[[Draw], Blow], processes: int = 1) -> Kind:
    """A fault that ends each launch that it befalls."""
    return Kind(name, how, meant, partial(chained, blow, processes))


_POINT = "the process sends it to itself, at a point drawn at random of"


def kills() -> list[Kind]:
    """A process is gone, or stands still, without a word."""
    phases = [
        ("a step", "step", "`Trainer.train_step`"),
        ("a checkpoint write", "write", "`_write_folder`, in the thread that writes"),
        ("the replacement of best/", "replacement", "`_replace`, which renames"),
        ("evaluation", "evaluation", "`Trainer.evaluate`, the sample included"),
        ("pruning", "pruning", "`_remove` of an old checkpoint"),
    ]
    meant = "goes on from the newest whole checkpoint"
    found = [
        of_runs(f"SIGKILL in {n}", f"{_POINT} {what}", meant, partial(kill_in, phase)) for n, phase, what in phases
    ]
    anywhere = "from outside, at a moment drawn at random of training or of the seconds before"
    found.append(of_runs("SIGKILL at any moment", anywhere, meant, kill_anywhere))
    how = f"{_POINT} a step, evaluation, checkpoint write or pruning, under"
    meant = "the other ends with 69, which is told with the killed one's rank; the launcher starts both again"
    for name, launcher, command in (
        ("SIGKILL of a rank of 2", "torchrun", "`torchrun --standalone --max-restarts`"),
        ("SIGKILL of a rank of 2, Accelerate", "accelerate", "`accelerate launch --rdzv_backend c10d --max_restarts`"),
        (
            "SIGKILL of a rank of 2 machines",
            "machines",
            "a `torchrun --nnodes 2 --max-restarts` for each, c10d on loopback",
        ),
    ):
        found.append(Kind(name, f"{how} {command}", meant, partial(restarted, launcher)))
    how = "from outside, at a moment of training drawn at random"
    meant = "both ranks end with 69, and say that the store is gone"
    found.append(of_runs("SIGKILL of torchrun of 2", how, meant, kill_launcher, 2))
    how = f"{_POINT} a step or evaluation; `train.peer_timeout` is 4 s"
    meant = "the other ends with 69, which is told with the stopped one's rank"
    found.append(of_runs("SIGSTOP of a rank of 2", how, meant, stop_rank, 2))
    return found


def stops() -> list[Kind]:
    """The run is asked to stop."""
    found = []
    for number, name, code in (
        (signal.SIGTERM, "SIGTERM", EXIT_PREEMPTED),
        (signal.SIGUSR1, "SIGUSR1", EXIT_PREEMPTED),
        (signal.SIGINT, "Ctrl-C", EXIT_INTERRUPTED),
    ):
        targets = [("process", 1, ""), ("rank", 2, " to a rank of 2"), ("launcher", 2, " to torchrun of 2")]
        for target, processes, where in targets:
            if (target, number) == ("launcher", signal.SIGUSR1):
                continue  # torchrun dies of it
            how = "from outside, at a moment of training drawn at random"
            meant = f"the step is finished and in a checkpoint; {code}" + (" on both ranks" if processes > 1 else "")
            found.append(of_runs(name + where, how, meant, partial(stop_signal, number, code, target), processes))
    how = "a step sleeps for an hour in C, from a point drawn at random on; the second once the first was heard"
    found.append(of_runs("Ctrl-C twice in a hung step", how, "130 at once, without a checkpoint", second_interrupt))
    return found


def disks() -> list[Kind]:
    """A checkpoint can't be written."""
    point = "from a point drawn at random of `_write_folder` on"
    meant = "2, and the message names the folder; goes on once there is space"
    full = Kind(
        "full disk",
        f"the run folder is on a tmpfs of {_DISK_MIB} MiB; not a byte of it is left {point}",
        meant,
        partial(on_small_disk, full_disk),
    )
    limit = f"RLIMIT_FSIZE, less than an optimizer's state takes, {point}"
    return [full, of_runs("limit on the size of files", limit, meant, file_limit)]


def tamperings() -> list[Kind]:
    """A checkpoint is not what was written."""
    meant = "one line names the file; goes on from the checkpoint before"
    changes = [
        ("truncated checkpoint", "a file of the newest, drawn at random, cut at a place drawn at random", truncate),
        ("flipped byte", "a byte of a file of the newest, both drawn at random", flip),
        ("missing file", "a file of the newest, drawn at random, deleted", remove_file),
    ]
    found = [of_runs(n, how, meant, partial(tampered, change, "passing over a damaged")) for n, how, change in changes]
    meant = "refused with 2; goes on once they are back"
    every = of_runs(
        "every checkpoint damaged", "one of the three above to each", meant, partial(tampered, spoil_all, "")
    )
    return [*found, every]


def strangers() -> list[Kind]:
    """The folder holds what is not the run's own."""
    meant = "one line says of which other run it is; goes on from the newest of its own"
    donors = [("model", "width"), ("vocabulary", "alphabet"), ("corpus", "order of the same words")]
    found = [
        of_runs(
            f"checkpoint of another {donor}",
            f"copied in as the newest, and left there: from a run with another {what}",
            meant,
            partial(tampered, partial(donate, donor), "of another run"),
        )
        for donor, what in donors
    ]
    meant = "the second is refused with 2, which names the first"
    found.append(Kind("two runs on one folder", "the same command while the first trains", meant, second_runs))
    how = "left by a SIGKILL; its .lock.json names a process that lives"
    stale = partial(tampered, claim_lock, "(resumed at step")
    return [*found, of_runs("stale lock", how, "no obstacle", stale)]


def wrong_numbers() -> list[Kind]:
    """One rank computes with what it should not."""
    nan = partial(wrong_number, "nan", "error: training diverged at step")
    index = "one bit of a window's start flips, at an update drawn at random: it lies outside of the text, or elsewhere"
    return [
        of_runs(
            "NaN loss on a rank of 2",
            "the loss times NaN, at an update drawn at random",
            "both end, rank 0 with 2; it is told with the step",
            nan,
            2,
        ),
        of_runs("corrupted index on a rank of 2", index, "both end, rank 0 with 2; it is told", wrong_batch, 2),
    ]


# ---- the table


def row(kind: Kind, trials: Sequence[Trial], seconds: float) -> dict[str, Any]:
    """A row's figures."""
    found = [t.damage for t in trials]
    return {
        "fault": kind.name,
        "how": kind.how,
        "survived_if": kind.meant,
        "tried": len(trials),
        "survived": sum(t.survived for t in trials),
        "chars_again": _extent([d.chars for d in found]),
        "checkpoint_bytes": _extent([d.checkpoint_bytes for d in found]),
        "ended_s": _extent([d.ended_s for d in found if d.ended_s is not None]),
        "wrong": [t.wrong for t in trials if t.wrong],
        "seconds": round(seconds, 1),
    }


def _extent(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": fmean(values), "max": max(values)} if values else None


def table(report: dict[str, Any]) -> str:
    """As Markdown, which docs/reliability.md shows."""
    here = report["machine"]
    lines = [
        f"{here['time']}, {here['cpu']}, {here['cores']} cores, torch {here['torch']}, accelerate "
        f"{here['accelerate']}, seed {report['seed']}",
        "",
        "| fault | how injected | survived if | tried | survived | characters trained again, mean (max) "
        "| checkpoint bytes lost, mean (max) | seconds until all had ended, mean (max) |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in report["rows"]:
        cells = [r["fault"], r["how"], r["survived_if"], str(r["tried"]), str(r["survived"])]
        cells += [_cell(r["chars_again"], ",.0f"), _cell(r["checkpoint_bytes"], ",.0f"), _cell(r["ended_s"], ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(extent: dict[str, float] | None, form: str) -> str:
    return f"{extent['mean']:{form}} ({extent['max']:{form}})" if extent else "none"


@app.command()
def reliability(
    times: Annotated[int, typer.Option(help="Injections of each fault.", min=1)] = 5,
    only: Annotated[list[str] | None, typer.Option(help="A fault's name, or a part of it; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Start of every random choice.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Inject every fault into real training runs, and print what was survived and what it cost."""
    chosen = [k for k in kinds() if not only or any(part.lower() in k.name.lower() for part in only)]
    if not chosen:
        raise typer.BadParameter(f"no such fault; there are {', '.join(k.name for k in kinds())}")
    report: dict[str, Any] = {"machine": machine(), "seed": seed, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for kind in chosen:
            began = time.monotonic()
            folder_name = re.sub(r"[^a-z0-9]+", "-", kind.name.lower())
            trials = kind.trials(folder_name, runs, times, random.Random(f"{seed} {kind.name}"))
            report["rows"].append(row(kind, trials, time.monotonic() - began))
            print(f"{kind.name}: {report['rows'][-1]['survived']} of {len(trials)}", file=sys.stderr)
            for trial in trials:
                if trial.wrong:
                    print(f"  {trial.wrong}", file=sys.stderr)
    print(json.dumps(report) if as_json else table(report))


if __name__ == "__main__":
    app()
