"""train/main.py with a fault injected, which its process triggers at a chosen point of a chosen call.

    CHARRNN_INJECT=JSON python -m benchmarks.reliability.inject ARGUMENTS OF train/main.py

benchmarks/reliability/harness.py starts it, under torchrun too. All else is the training program's own. Events go into
a file, one JSON object a line with the time `t`: the process starts, training begins (`fit`), the fault, the exit code.
"""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.reliability import targets
from benchmarks.reliability.points import COUNTED, ProcessFault, at_point
from benchmarks.reliability.targets import locate

INJECT = "CHARRNN_INJECT"
_BALLAST = "ballast"
_LIMIT_BYTES = 20_000  # fewer than an optimizer's state takes

Event = dict[str, Any]


def record(events: Path, event: str, **fields: Any) -> None:
    """Appends an event, in one write."""
    line = json.dumps({"event": event, "t": time.time(), **fields}) + "\n"
    with events.open("ab", buffering=0) as file:
        file.write(line.encode())


def read_events(path: Path, event: str = "") -> list[Event]:
    """Returns all events in order, or only those named `event`."""
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in events if not event or e["event"] == event]


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
