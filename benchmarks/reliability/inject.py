"""train/main.py with a fault injected, which its process triggers at a chosen point of a chosen call.

    CHARRNN_INJECT=JSON python -m benchmarks.reliability.inject ARGUMENTS OF train/main.py

benchmarks/reliability/harness.py starts it, under torchrun too. All else is the training program's own. Events go into
a file, one JSON object a line with the time `t`: the process starts, training begins (`fit`), the fault, the exit code.
"""

import functools
import json
import linecache
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.reliability import targets
from benchmarks.reliability.targets import locate

ROOT = Path(__file__).resolve().parents[2]
INJECT = "CHARRNN_INJECT"
# Files whose lines count as points of a call: the project, and the removal of folders.
TRACED = (str(ROOT / "charrnn"), str(ROOT / "train"), str(Path(shutil.__file__)))
_BALLAST = "ballast"
_LIMIT_BYTES = 20_000  # fewer than an optimizer's state takes

Event = dict[str, Any]


@dataclass(frozen=True)
class ProcessFault:
    """A fault that a process triggers itself.

    Attributes:
        action: One of ACTIONS, at a point of a phase; nan, outside or elsewhere, in the numbers of a step.
        phase: One of the first five of targets.FUNCTIONS.
        call: Which of the phase's calls, counted from 1 in each process; of a wrong number, which step.
        point: The share of the call's lines that lie before it, as the call before it counted them, so that `call`
            must be 2 or more; or a piece of the line's text.
        rank: Of the process.
    """

    action: str
    phase: str = ""
    call: int = 1
    point: float | str = 0.0
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


# ---- points of a call

# Which calls of a phase count; of the others, all.
COUNTED: dict[str, Callable[..., bool]] = {
    "replacement": lambda temporary, folder: folder.exists(),
    "evaluation": lambda trainer: trainer.progress.evaluated_step != trainer.progress.step,
    "pruning": lambda folder: folder.name.startswith("step-"),
}


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
        point: int | str | None = fault.point if isinstance(fault.point, str) else int(fault.point * lines)
        if calls < fault.call:
            point = None  # its lines are counted
        seen, done = 0, False

        def line(frame: FrameType) -> None:
            nonlocal seen, done
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if not done and (point == seen or (isinstance(point, str) and point in text)):
                done = True
                trigger(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: {text}")
            seen += 1

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if not frame.f_code.co_filename.startswith(TRACED):
                return None
            if event == "line":
                line(frame)
            return trace

        sys.settrace(trace)  # of this thread
        try:
            return function(*args)
        finally:
            sys.settrace(None)
            lines = seen
            if point is not None and not done:
                trigger("the call's end")

    return wrapped


# ---- actions


def fill_disk(run_dir: Path) -> None:
    """Leaves no byte free on the disk that holds the run folder."""
    with (run_dir / _BALLAST).open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while ballast.write(b"\0" * size):
                    pass
            except OSError:
                continue


def free_disk(run_dir: Path) -> None:
    """Undoes `fill_disk`."""
    (run_dir / _BALLAST).unlink()


def pause(run_dir: Path) -> None:
    """Waits until there is a file named `release` beside the run folder."""
    while not (run_dir.parent / "release").exists():
        time.sleep(0.05)


ACTIONS: dict[str, Callable[[Path], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "fill": fill_disk,
    "limit": lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES)),
    "sleep": lambda _: time.sleep(3600),
    "pause": pause,
}


class Process:
    """This process: the events it records, and the fault that it triggers."""

    def __init__(self, events: str, run_dir: str, faults: list[dict[str, Any]], before: int) -> None:
        """Takes what CHARRNN_INJECT holds.

        Args:
            events: Path of the file of events.
            run_dir: Path of the run folder.
            faults: Fields of a ProcessFault for each time that the launcher starts the processes.
            before: Faults recorded before the launch.
        """
        self.events, self.run_dir = Path(events), Path(run_dir)
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.trainer: Any = None
        self.began = 0  # step at which training begins
        # Launchers count their restarts each for itself, so it is the first that no process has triggered.
        due = faults[len(read_events(self.events, "fault")) - before :]
        self.fault = ProcessFault(**due[0]) if due else None

    def record(self, event: str, **fields: Any) -> None:
        """Records an event of this rank."""
        record(self.events, event, rank=self.rank, pid=os.getpid(), **fields)

    def trigger(self, where: str) -> None:
        """Records the fault, and triggers it."""
        assert self.fault is not None
        action, phase = self.fault.action, self.fault.phase
        self.record("fault", step=self.trainer.progress.step, action=action, phase=phase, where=where)
        if action in ACTIONS:
            ACTIONS[action](self.run_dir)

    def watch(self) -> None:
        """Records when training begins, and the exit code of a rank that leaves without interpreter tear-down."""
        leave, fit = os._exit, getattr(*locate("fit"))

        def recorded_exit(code: int) -> None:
            self.record("exit", code=code)
            leave(code)

        def recorded_fit(trainer: Any) -> Any:
            self.trainer, self.began = trainer, trainer.progress.step
            self.record("fit", step=self.began)
            return fit(trainer)

        os._exit = recorded_exit  # type: ignore[assignment]
        targets.replace("fit", recorded_fit)

    def inject(self) -> None:
        """Replaces the function that the fault strikes in, if it is this rank's."""
        fault = self.fault
        if fault is None or fault.rank != self.rank:
            return
        target = {"nan": "loss", "outside": "batch", "elsewhere": "batch"}.get(fault.action, fault.phase)
        function = getattr(*locate(target))
        if fault.action == "nan":
            changed = self._with_nan(function, fault)
        elif fault.action in ("outside", "elsewhere"):
            changed = self._with_wrong_start(function, fault)
        else:
            changed = at_point(function, COUNTED.get(fault.phase, lambda *_: True), fault, self.trigger)
        targets.replace(target, changed)

    def _with_nan(self, loss: Callable[..., Any], fault: ProcessFault) -> Callable[..., Any]:
        """The loss is NaN in one step."""
        calls = 0

        def changed(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            value, after = loss(*args)
            if calls == fault.call:
                self.trigger("the loss is NaN")
                value = value * float("nan")
            return value, after

        return changed

    def _with_wrong_start(self, batch: Callable[..., Any], fault: ProcessFault) -> Callable[..., Any]:
        """A bit of one window's start is flipped in one step."""
        bit, struck = {"outside": 40, "elsewhere": 3}[fault.action], False

        def changed(plan: Any, step: int) -> Any:
            nonlocal struck
            found = batch(plan, step)
            if self.trainer is None or step != self.began + fault.call - 1:
                return found
            if not struck:
                struck = True
                self.trigger(f"bit {bit} of a window's start flips")
            starts = found.starts.copy()  # (B,)
            starts[len(starts) // self.world_size * self.rank] ^= 1 << bit
            return replace(found, starts=starts)

        return changed

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

    try:
        program.main()
    except SystemExit as end:
        here.record("exit", code=end.code)
        raise
    except BaseException:
        here.record("exit", code=1)
        raise


if __name__ == "__main__":
    main()
