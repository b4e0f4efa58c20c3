"""train/main.py with a fault built in, which its process commits at a chosen point of a chosen call.

    CHARRNN_INJECT=JSON python -m benchmarks.reliability.inject ARGUMENTS OF train/main.py

benchmarks/reliability/runs.py starts it, under torchrun too. All else is the training program's own. What happens is
noted in a file, one JSON object a line with the time `t`: that a process starts, that training begins, the fault, and
the exit code.
"""

import functools
import importlib
import json
import linecache
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INJECT = "CHARRNN_INJECT"
# What a point of a call may be a line of: the project, and the removal of folders.
_TRACED = (str(ROOT / "charrnn"), str(ROOT / "train"), str(Path(shutil.__file__)))
_BALLAST = "ballast"
_LIMIT_BYTES = 20_000

Event = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One fault.

    action: kill, stop, fill, limit, sleep or pause, at a point of a phase; nan, outside or odd, in the numbers of an
    update. phase: one of PHASES. call: which of the phase's calls, counted from 1 in each process; for nan, outside and
    odd, which update. point: the share of the call's lines that lie before it, as the call before it counted them, so
    that `call` must be 2 or more; or a piece of the line's text. rank: of the process.
    """

    action: str
    phase: str = ""
    call: int = 1
    point: float | str = 0.0
    rank: int = 0


@dataclass(frozen=True)
class Injection:
    """faults: one for each time that the launcher starts the processes; none for the times after. Paths as text.

    before: faults that were noted before the launch.
    """

    events: str
    run_dir: str
    faults: tuple[Fault, ...] = ()
    before: int = 0

    def to_json(self) -> str:
        """For the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Injection":
        """The inverse of `to_json`."""
        raw = json.loads(text)
        return cls(raw["events"], raw["run_dir"], tuple(Fault(**f) for f in raw["faults"]), raw["before"])

    def due(self) -> Fault | None:
        """The first fault that no process has committed. (Launchers count their restarts each for itself.)"""
        done = len(read_events(Path(self.events), "fault")) - self.before
        return self.faults[done] if done < len(self.faults) else None


def note(events: Path, event: str, **fields: Any) -> None:
    """Appends a line; whole, because it is one write."""
    line = json.dumps({"event": event, "t": time.time(), **fields}) + "\n"
    with events.open("ab", buffering=0) as file:
        file.write(line.encode())


def read_events(path: Path, event: str = "") -> list[Event]:
    """All that was noted, in order; `event`: only such."""
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in events if not event or e["event"] == event]


# ---- where: which function a phase is, and which of its calls count


def _every(*_: Any) -> bool:
    return True


def _replaces_a_folder(temporary: Path, folder: Path) -> bool:
    return folder.exists()


def _prunes(folder: Path) -> bool:
    return folder.name.startswith("step-")


def _evaluates(trainer: Any) -> bool:
    return bool(trainer.progress.evaluated_step != trainer.progress.step)


PHASES: dict[str, tuple[str, str, Callable[..., bool]]] = {
    "step": ("train.trainer", "Trainer.train_step", _every),
    "write": ("train.checkpoint.format", "_write_folder", _every),
    "replacement": ("train.checkpoint.format", "_replace", _replaces_a_folder),
    "evaluation": ("train.trainer", "Trainer.evaluate", _evaluates),
    "pruning": ("train.checkpoint.format", "_remove", _prunes),
}


def at_point(
    function: Callable[..., Any], counts: Callable[..., bool], fault: Fault, commit: Callable[[str], None]
) -> Callable[..., Any]:
    """`function`, with `commit` called at the fault's point, or at the call's end when it has too few lines."""
    calls = lines = 0

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        nonlocal calls, lines
        if not counts(*args):
            return function(*args)
        calls += 1
        if calls not in (fault.call - 1, fault.call):
            return function(*args)
        target = (
            None if calls < fault.call else fault.point if isinstance(fault.point, str) else int(fault.point * lines)
        )
        seen, done = 0, False

        def line(frame: FrameType) -> None:
            nonlocal seen, done
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if not done and (target == seen or (isinstance(target, str) and target in text)):
                done = True
                commit(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: {text}")
            seen += 1

        try:
            return _traced(function, args, line)
        finally:
            lines = seen
            if target is not None and not done:
                commit("the call's end")

    return wrapped


def _traced(function: Callable[..., Any], args: tuple[Any, ...], line: Callable[[FrameType], None]) -> Any:
    """Calls `function`, and `line` before each line of the project that runs in it, in this thread."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_TRACED):
            return None
        if event == "line":
            line(frame)
        return trace

    sys.settrace(trace)
    try:
        return function(*args)
    finally:
        sys.settrace(None)


# ---- what


def fill_disk(folder: Path) -> None:
    """Leaves no byte free on the disk that holds `folder`."""
    with (folder / _BALLAST).open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12, 1):
            while True:
                try:
                    ballast.write(b"\0" * size)
                except OSError:
                    break


def free_disk(folder: Path) -> None:
    """Undoes `fill_disk`."""
    (folder / _BALLAST).unlink()


def limit_files(folder: Path) -> None:
    """From now on this process can write no file beyond some bytes, fewer than an optimizer's state takes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES))


def sleep(folder: Path) -> None:
    """A call into C that does not come back."""
    time.sleep(3600)


def pause(folder: Path) -> None:
    """Waits until there is a file named `release` beside the run folder."""
    while not (folder.parent / "release").exists():
        time.sleep(0.05)


ACTIONS: dict[str, Callable[[Path], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "fill": fill_disk,
    "limit": limit_files,
    "sleep": sleep,
    "pause": pause,
}


def inject_nan(fault: Fault, commit: Callable[[str], None]) -> None:
    """The loss of update `fault.call` becomes NaN on this rank."""
    from charrnn.model.rnn import NextCharLoss

    forward, calls = NextCharLoss.forward, 0

    def spoilt(module: Any, window: Any, state: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, after = forward(module, window, state)
        if calls != fault.call:
            return loss, after
        commit("the loss is NaN")
        return loss * float("nan"), after

    NextCharLoss.forward = spoilt  # type: ignore[assignment]


def inject_batch(fault: Fault, commit: Callable[[str], None]) -> None:
    """One bit of one window's start flips on this rank, ahead of update `fault.call`."""
    from charrnn.windows import Batch, WindowPlan
    from train.trainer import Trainer

    bit = {"outside": 40, "odd": 3}[fault.action]
    next_step, calls = Trainer.next_step, 0

    def flipped(plan: WindowPlan, step: int, row: int) -> Batch:
        batch = WindowPlan.batch(plan, step)
        starts = batch.starts.copy()  # (B,)
        starts[row] ^= 1 << bit
        return replace(batch, starts=starts)

    def spoilt(trainer: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call:
            commit(f"bit {bit} of a window's start flips")
            plan, row = trainer.data.plan, trainer.data.rows.start
            object.__setattr__(plan, "batch", lambda step: flipped(plan, step, row))  # the plan is frozen
        return next_step(trainer)

    Trainer.next_step = spoilt  # type: ignore[assignment, method-assign]


# ---- the program


class Injected:
    """This process: what it notes, and the fault that it commits."""

    def __init__(self, injection: Injection) -> None:
        self.events, self.run_dir = Path(injection.events), Path(injection.run_dir)
        self.rank = int(os.environ.get("RANK", "0"))
        self.trainer: Any = None
        self.fault = injection.due()

    def note(self, event: str, **fields: Any) -> None:
        """Notes something of this rank."""
        note(self.events, event, rank=self.rank, pid=os.getpid(), **fields)

    def commit(self, where: str) -> None:
        """Notes the fault, and commits it."""
        assert self.fault is not None
        fault = {"action": self.fault.action, "phase": self.fault.phase, "where": where}
        self.note("fault", step=self.trainer.progress.step, **fault)
        if self.fault.action in ACTIONS:
            ACTIONS[self.fault.action](self.run_dir)

    def note_exits(self) -> None:
        """Notes the exit code of a rank that leaves without the interpreter's tear-down. Before train is imported."""
        leave = os._exit

        def noted(code: int) -> None:
            self.note("exit", code=code)
            leave(code)

        os._exit = noted  # type: ignore[assignment]

    def note_beginning(self) -> None:
        """Notes when training begins, and at which step."""
        from train.trainer import Trainer

        fit = Trainer.fit

        def noted(trainer: Any) -> Any:
            self.trainer = trainer
            self.note("fit", step=trainer.progress.step)
            return fit(trainer)

        Trainer.fit = noted  # type: ignore[assignment]

    def inject(self) -> None:
        """Builds the fault in, when it is this rank's."""
        fault = self.fault
        if fault is None or fault.rank != self.rank:
            return
        if fault.action == "nan":
            inject_nan(fault, self.commit)
        elif fault.action in ("outside", "odd"):
            inject_batch(fault, self.commit)
        else:
            module_name, qualified, counts = PHASES[fault.phase]
            *owners, name = qualified.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
            setattr(owner, name, at_point(getattr(owner, name), counts, fault, self.commit))

    def checkpoint_bytes(self) -> dict[str, int]:
        """Each checkpoint folder of the run, finished or not, and its bytes."""
        folders = [p for pattern in ("step-*", ".writing-*", ".replaced-*") for p in self.run_dir.glob(pattern)]
        return {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in folders}


def main() -> None:
    """Runs train/main.py's own `main`."""
    here = Injected(Injection.from_json(os.environ[INJECT]))
    here.note("start", checkpoints=here.checkpoint_bytes() if here.rank == 0 else {})
    here.note_exits()
    here.note_beginning()
    here.inject()
    from train import main as program

    try:
        program.main()
    except SystemExit as end:
        here.note("exit", code=end.code)
        raise
    except BaseException:
        here.note("exit", code=1)
        raise


if __name__ == "__main__":
    main()
