"""Runs of several injections, and the verdict on each.

A run is a chain of launches: each meets one injection and ends, the next is the same command again, and the last goes
on to the end, which must be that of a run without faults.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.inject import Event, ProcessFault, read_events
from benchmarks.reliability.launch import BATCH_SIZE, SAVED_EVERY, SEQ_LEN, Launch, Workspace, message
from benchmarks.training import read_metrics
from charrnn.errors import EXIT_DONE, EXIT_PEER_LOST

_MOST_STEPS = 2 * SAVED_EVERY  # lost by one fault
_WITHIN_S = 20.0  # of a fault all processes must have ended
_UNTIMED = ("time_s", "train/chars_per_s", "train/gflops", "train/mfu")


@dataclass(frozen=True)
class Injection:
    """A fault of one launch, and what must come of it.

    Attributes:
        fault: The fault that a process triggers itself.
        outside: Called while the launch runs.
        check: Called after it, with the exit code; returns what went wrong, or "".
        max_steps: Steps that may be lost.
    """

    fault: ProcessFault | None = None
    outside: Callable[[Launch], None] = lambda launch: None
    check: Callable[[Launch, int], str] = lambda launch, code: ""
    max_steps: int = _MOST_STEPS


@dataclass(frozen=True)
class Cost:
    """What one fault cost.

    Attributes:
        steps: Trained again.
        unfinished_bytes: Of the checkpoint that was being written.
        passed_over: Checkpoints that bear their names, from which it did not resume.
        ended_s: From the fault until every process that could end by itself had ended.
    """

    steps: int = 0
    unfinished_bytes: int = 0
    passed_over: int = 0
    ended_s: float = 0.0

    @property
    def chars(self) -> int:
        """Characters trained on again."""
        return self.steps * BATCH_SIZE * SEQ_LEN


@dataclass(frozen=True)
class Trial:
    """An injection's result. wrong: what was not as it should be, or ""."""

    cost: Cost
    wrong: str


def chain(workspace: Workspace, run: str, injections: Sequence[Injection], processes: int = 1) -> list[Trial]:
    """Starts one run again and again, an injection a launch, and once more to its end."""
    wrongs = []
    for injection in injections:
        launch = workspace.start(run, [injection.fault] if injection.fault else [], processes)
        injection.outside(launch)
        code = launch.wait()
        wrongs.append(injection.check(launch, code) if code else "the run ended before the fault")
    last = workspace.start(run, processes=processes)
    last.wait()
    return _verdict(workspace, run, last, injections, wrongs, processes)


def chain_of_restarts(
    workspace: Workspace, run: str, injections: Sequence[Injection], processes: int = 2, launcher: str = "torchrun"
) -> list[Trial]:
    """Does the same in one launch of two processes, which the launcher restarts after each death of a rank."""
    faults = [injection.fault for injection in injections if injection.fault]
    launch = workspace.start(run, faults, processes, len(faults), launcher)
    launch.wait()
    reported = [int(rank) for rank in re.findall("error: " + message("died", r"(\d+)", r"\(on [^)]+\)"), launch.output)]
    codes = [e["code"] for e in launch.events("exit")]
    wrong = ""
    if reported != [fault.rank for fault in faults]:
        wrong = f"killed were {[f.rank for f in faults]}, reported {reported}"
    elif codes != [EXIT_PEER_LOST] * len(faults) + [EXIT_DONE] * processes:
        wrong = f"the ranks left with {codes}"
    return _verdict(workspace, run, launch, injections, [wrong] * len(faults), processes)


def outcome(run_dir: Path) -> dict[str, Any]:
    """Returns digests of the newest step checkpoint and the best one, and the log without its times."""
    newest = max(run_dir.glob("step-*"))
    files = [newest / f"{name}.safetensors" for name in ("model", "optimizer", "state")]
    files.append(run_dir / "best" / "model.safetensors")
    digests = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return digests | {"log": [{k: v for k, v in r.items() if k not in _UNTIMED} for r in read_metrics(run_dir)]}


def reference(workspace: Workspace, processes: int) -> dict[str, Any]:
    """Returns the outcome of the run without faults, made once. Raises: RuntimeError when that run fails."""
    run_dir = workspace.folder / f"reference-{processes}"
    if not run_dir.exists():
        launch = workspace.start(run_dir.name, processes=processes)
        if launch.wait():
            raise RuntimeError(launch.output)
    return outcome(run_dir)


def _verdict(
    workspace: Workspace, run: str, last: Launch, injections: Sequence[Injection], wrongs: Sequence[str], processes: int
) -> list[Trial]:
    """Judges each injection by what was `wrong` with it, what it cost, and how the run ended in its `last` launch."""
    ended = ""
    if last.process.returncode:
        ended = f"the run did not resume to its end: {last.output[-2000:]}"
    elif outcome(workspace.folder / run) != reference(workspace, processes):
        ended = "the run's end is not that of the run without faults"
    found = costs(read_events(workspace.events(run)))
    if len(found) != len(injections):
        raise RuntimeError(f"{len(injections)} faults were injected and {len(found)} recorded: {last.output[-2000:]}")
    return [
        Trial(cost, wrong or ended or _too_much(cost, injection.max_steps))
        for cost, wrong, injection in zip(found, wrongs, injections, strict=True)
    ]


def _too_much(cost: Cost, max_steps: int) -> str:
    if cost.steps > max_steps:
        return f"{cost.steps} steps were lost, more than {max_steps}"
    if cost.passed_over:
        return "a checkpoint that bore its name was not complete"
    if cost.ended_s > _WITHIN_S:
        return f"the processes took {cost.ended_s:.0f} s to end, more than {_WITHIN_S:.0f}"
    return ""


def costs(events: Sequence[Event]) -> list[Cost]:
    """Returns what each fault among a run's events cost; the run must have ended well at last."""
    return [_cost(e, events[i + 1 :]) for i, e in enumerate(events) if e["event"] == "fault"]


def _cost(fault: Event, later: Sequence[Event]) -> Cost:
    restart = next((k for k, e in enumerate(later) if e["event"] == "start"), len(later))
    before, after = later[:restart], later[restart:]
    reached = max([fault["step"], *(e["step"] for e in before if e["event"] == "ended")])
    resumed = next((e["step"] for e in after if e["event"] == "fit"), reached)
    folders: dict[str, int] = next((e["checkpoints"] for e in after if e["event"] == "start" and e["rank"] == 0), {})
    steps = [int(name.removeprefix("step-")) for name in folders if name.startswith("step-")]
    ends = [e["t"] for e in before if e["event"] == "exit"] or [e["t"] for e in before if e["event"] == "ended"]
    return Cost(
        steps=max(0, reached - resumed),
        unfinished_bytes=sum(size for name, size in folders.items() if not name.startswith("step-")),
        passed_over=sum(resumed < step <= reached for step in steps),
        ended_s=max(ends, default=fault["t"]) - fault["t"],
    )
