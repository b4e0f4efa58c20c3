"""train/main.py with a fault injected, which its process triggers at a random line of a chosen call.

launch.py starts it, under torchrun too. All else is the training program's own. Events go into a file, one JSON object
a line with the time `t`: the process starts, training begins (`fit`), the fault, the exit code.
"""

import functools
import importlib
import json
import linecache
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import ROOT

INJECT = "CHARRNN_INJECT"
# Files whose lines count as points of a call: the project, and the removal of folders.
TRACED = (str(ROOT / "charrnn"), str(ROOT / "train"), str(Path(shutil.__file__)))
FIT = "train.loop.trainer:Trainer.fit"

Event = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """Calls that a fault strikes in.

    Attributes:
        function: "module:qualified name".
        calls: Bounds of the call in which it strikes; 2 steps between checkpoints, 3 between evaluations.
        counts: Which calls count.
    """

    function: str
    calls: tuple[int, int]
    counts: Callable[..., bool] = lambda *_: True


PHASES = {
    "step": Phase("train.loop.trainer:Trainer.train_step", (2, 9)),
    "write": Phase("train.checkpoint.folders:write_folder", (2, 6)),
    "replacement": Phase("train.checkpoint.folders:_replace", (2, 3), lambda temporary, folder: folder.exists()),
    "evaluation": Phase(
        "train.loop.trainer:Trainer.evaluate",
        (2, 3),
        lambda trainer: trainer.progress.evaluated_step != trainer.progress.step,
    ),
    "pruning": Phase("train.checkpoint.folders:remove", (2, 4), lambda folder: folder.name.startswith("step-")),
}


@dataclass(frozen=True)
class ProcessFault:
    """A fault that a process triggers itself.

    Attributes:
        number: Of the signal that it sends itself.
        phase: One of PHASES.
        call: Which of the phase's calls, counted from 1 in each process; 2 or more.
        point: The share of the call's lines that lie before it, as the call before it counted them.
        rank: Of the process.
    """

    number: int
    phase: str
    call: int
    point: float
    rank: int = 0


def record(events: Path, event: str, **fields: Any) -> None:
    """Appends an event, in one write."""
    line = json.dumps({"event": event, "t": time.time(), **fields}) + "\n"
    with events.open("ab", buffering=0) as file:
        file.write(line.encode())


def read_events(path: Path, event: str = "") -> list[Event]:
    """Returns all events in order, or only those named `event`."""
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in events if not event or e["event"] == event]


def at_point(
    function: Callable[..., Any], counts: Callable[..., bool], fault: ProcessFault, trigger: Callable[[str], None]
) -> Callable[..., Any]:
    """Wraps `function` so that `trigger` is called at the fault's point, or at the call's end if it has fewer lines."""
    calls = lines = 0

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        nonlocal calls, lines
        counted = counts(*args)
        calls += counted
        if not counted or calls not in (fault.call - 1, fault.call):
            return function(*args)
        point, seen = int(fault.point * lines) if calls == fault.call else None, 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            file = frame.f_code.co_filename
            if not file.startswith(TRACED):
                return None
            if event == "line":
                if seen == point:
                    trigger(f"{Path(file).name}:{frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()}")
                seen += 1
            return trace

        sys.settrace(trace)  # of this thread
        try:
            return function(*args)
        finally:
            sys.settrace(None)
            lines = seen
            if point is not None and seen <= point:
                trigger("the call's end")

    return wrapped


def locate(name: str) -> tuple[Any, str]:
    """Returns the module or class that holds a function, "module:qualified name", and its name there."""
    module, qualified = name.split(":")
    *owners, attribute = qualified.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def replace(name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function by what `change` makes of it, in every module that has imported it by name too."""
    owner, attribute = locate(name)
    function = getattr(owner, attribute)
    changed = change(function)
    setattr(owner, attribute, changed)
    for module in list(sys.modules.values()):
        if vars(module).get(attribute) is function:
            setattr(module, attribute, changed)


class Process:
    """This process: the events it records, and the fault that it triggers."""

    def __init__(self, events: str, run_dir: str, faults: list[dict[str, Any]], before: int) -> None:
        """Takes what CHARRNN_INJECT holds.

        Args:
            events: Path.
            run_dir: Path.
            faults: Fields of a ProcessFault for each time that the launcher starts the processes.
            before: Faults recorded before the launch.
        """
        self.events, self.run_dir, self.rank = Path(events), Path(run_dir), int(os.environ.get("RANK", "0"))
        self.trainer: Any = None
        # Launchers count their restarts each for itself, so it is the first that no process has triggered.
        due = faults[len(read_events(self.events, "fault")) - before :]
        self.fault = ProcessFault(**due[0]) if due else None

    def record(self, event: str, **fields: Any) -> None:
        """Records an event of this rank."""
        record(self.events, event, rank=self.rank, pid=os.getpid(), **fields)

    def watch(self) -> None:
        """Records when training begins, and the exit code of a rank that leaves without interpreter tear-down."""
        leave = os._exit

        def recorded_exit(code: int) -> None:
            self.record("exit", code=code)
            leave(code)

        def recorded(fit: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def recorded_fit(trainer: Any) -> Any:
                self.trainer = trainer
                self.record("fit", step=trainer.progress.step)
                return fit(trainer)

            return recorded_fit

        os._exit = recorded_exit  # type: ignore[assignment]
        replace(FIT, recorded)

    def inject(self) -> None:
        """Replaces the function that the fault strikes in, if it is this rank's."""
        fault = self.fault
        if fault is None or fault.rank != self.rank:
            return

        def trigger(where: str) -> None:
            self.record("fault", step=self.trainer.progress.step, phase=fault.phase, where=where)
            os.kill(os.getpid(), fault.number)

        phase = PHASES[fault.phase]
        replace(phase.function, lambda function: at_point(function, phase.counts, fault, trigger))

    def checkpoint_bytes(self) -> dict[str, int]:
        """Returns the bytes of each checkpoint folder of the run, finished or not."""
        folders = [p for pattern in ("step-*", ".writing-*", ".replaced-*") for p in self.run_dir.glob(pattern)]
        return {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in folders}


def main() -> None:
    """Runs train/main.py's own `main`."""
    here = Process(**json.loads(os.environ[INJECT]))
    here.record("start", checkpoints=here.checkpoint_bytes() if here.rank == 0 else {})
    here.watch()
    here.inject()
    from train import main as program

    code: Any = 1
    try:
        program.main()
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    finally:
        here.record("exit", code=code)


if __name__ == "__main__":
    main()
