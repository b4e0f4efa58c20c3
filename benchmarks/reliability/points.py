"""Points of a call at which a process triggers a fault: lines of the project's code."""

import functools
import linecache
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Files whose lines count as points of a call: the project, and the removal of folders.
TRACED = (str(ROOT / "charrnn"), str(ROOT / "train"), str(Path(shutil.__file__)))


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
