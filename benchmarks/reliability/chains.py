"""Runs of several injections, and the verdict on each.

A run is a chain of launches: each meets one injection and ends, the next is the same command again, and the last goes
on to the end, which must be that of a run without faults.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.reliability.harness import Cost, Workspace, costs, outcome
from benchmarks.reliability.inject import read_events
from benchmarks.reliability.launch import SAVED_EVERY, Launch
from benchmarks.reliability.points import ProcessFault
from benchmarks.reliability.targets import message
from charrnn.errors import EXIT_DONE, EXIT_PEER_LOST, EXIT_USER_ERROR

DISK_MIB = 4

# What a launch and its exit code did wrong, or "".
Check = Callable[[Launch, int], str]


@dataclass(frozen=True)
class Injection:
    """A fault of one launch, and what must come of it.

    Attributes:
        fault: The fault that a process triggers itself.
        prepare: Called before the launch, while nobody trains there; returns what went wrong.
        outside: Called while it runs.
        check: Called after it.
        max_steps: Steps that may be lost.
        corrupts: Whether it corrupts checkpoints; else each that bears its name must be complete.
        within_s: Seconds after which all processes must have ended.
    """

    fault: ProcessFault | None = None
    prepare: Callable[[Workspace, str], str] = lambda workspace, run: ""
    outside: Callable[[Launch], None] = lambda launch: None
    check: Check = lambda launch, code: ""
    max_steps: int = 2 * SAVED_EVERY
    corrupts: bool = False
    within_s: float = 20.0


@dataclass(frozen=True)
class Trial:
    """An injection's result. wrong: what was not as it should be, or ""."""

    cost: Cost
    wrong: str


Run = Callable[[Workspace, str, list[Injection], int], list[Trial]]


# ---- runs of several injections


def chain(workspace: Workspace, run: str, injections: Sequence[Injection], processes: int = 1) -> list[Trial]:
    """Starts one run again and again, an injection a launch, and once more to its end."""
    wrongs = []
    for injection in injections:
        wrong = injection.prepare(workspace, run)
        launch = workspace.start(run, [injection.fault] if injection.fault else [], processes=processes)
        injection.outside(launch)
        code = launch.wait()
        wrongs.append(wrong or ("" if code else "the run ended before the fault") or injection.check(launch, code))
    last = workspace.start(run, processes=processes)
    last.wait()
    return verdict(workspace, run, last, injections, wrongs, processes)


def chain_of_restarts(
    workspace: Workspace, run: str, injections: Sequence[Injection], processes: int = 2, launcher: str = "torchrun"
) -> list[Trial]:
    """Does the same in one launch of two processes, which the launcher restarts after each death of a rank."""
    faults = [injection.fault for injection in injections if injection.fault]
    launch = workspace.start(run, faults, processes=processes, restarts=len(faults), launcher=launcher)
    launch.wait()
    reported = [int(rank) for rank in re.findall("error: " + message("died", r"(\d+)", r"\(on [^)]+\)"), launch.output)]
    codes = [e["code"] for e in launch.events("exit")]
    wrong = ""
    if reported != [fault.rank for fault in faults]:
        wrong = f"killed were {[f.rank for f in faults]}, reported {reported}"
    elif codes != [EXIT_PEER_LOST] * len(faults) + [EXIT_DONE] * processes:
        wrong = f"the ranks left with {codes}"
    return verdict(workspace, run, launch, injections, [wrong] * len(faults), processes)


def on_small_disk(workspace: Workspace, run: str, injections: Sequence[Injection], processes: int = 1) -> list[Trial]:
    """Does the same as `chain` on a disk of its own; returns nothing where mounting one is not permitted."""
    disk = workspace.run_dir(f"disk-{run}")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "charrnn", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        return []
    try:
        return chain(workspace, f"disk-{run}/run", injections, processes)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def second_runs(workspace: Workspace, run: str, injections: Sequence[Injection], processes: int = 1) -> list[Trial]:
    """Pauses a run in a step, starts others on its folder, and lets it go on to its end."""
    release = workspace.folder / "release"
    release.unlink(missing_ok=True)
    first = workspace.start(run, [fault for i in injections[:1] if (fault := i.fault)])
    first.wait_for(lambda: first.events("fault"))
    tried = []
    for _ in injections:
        began = time.monotonic()
        second = subprocess.run(
            workspace.command(run),
            cwd=workspace.folder,
            env=workspace.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        expected = message("locked", re.escape(run), str(first.process.pid))
        refused = second.returncode == EXIT_USER_ERROR and re.search(expected, second.stderr)
        wrong = "" if refused else f"it left with {second.returncode}: {second.stderr}"
        tried.append((wrong, time.monotonic() - began))
    release.touch()
    ended = first.output if first.wait() else ""
    if not ended and outcome(workspace.run_dir(run)) != workspace.reference(processes):
        ended = "the first run's end is not that of a run alone"
    return [Trial(Cost(ended_s=seconds), wrong or ended) for wrong, seconds in tried]


def verdict(
    workspace: Workspace, run: str, last: Launch, injections: Sequence[Injection], wrongs: Sequence[str], processes: int
) -> list[Trial]:
    """Judges each injection by what was `wrong` with it, what it cost, and how the run ended in its `last` launch."""
    ended = ""
    if last.process.returncode:
        ended = f"the run did not resume to its end: {last.output[-2000:]}"
    elif outcome(workspace.run_dir(run)) != workspace.reference(processes):
        ended = "the run's end is not that of the run without faults"
    found = costs(read_events(workspace.events(run)))
    if len(found) != len(injections):
        raise RuntimeError(f"{len(injections)} faults were injected and {len(found)} recorded: {last.output[-2000:]}")
    return [
        Trial(cost, wrong or ended or _too_much(cost, injection))
        for cost, wrong, injection in zip(found, wrongs, injections, strict=True)
    ]


def _too_much(cost: Cost, injection: Injection) -> str:
    if cost.steps > injection.max_steps:
        return f"{cost.steps} steps were lost, more than {injection.max_steps}"
    if cost.passed_over_bytes and not injection.corrupts:
        return "a checkpoint that bore its name was not complete"
    if cost.ended_s is not None and cost.ended_s > injection.within_s:
        return f"the processes took {cost.ended_s:.0f} s to end, more than {injection.within_s:.0f}"
    return ""
