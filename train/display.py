"""Progress on stderr: a bar where there is a terminal, plain lines where there is none."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

_PLAIN_LINE_EVERY_S = 5.0


def format_duration(seconds: float) -> str:
    """41s, 3m12s, 2h05m or 4d06h; the two largest units."""
    whole = round(max(0.0, seconds))
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part_size:02d}{part}"
    return f"{whole}s"


class Display:
    """Shows where a run stands. Use it as a context manager.

    total_steps: 0 when only time limits the run. time_limit_s: 0 when only steps do. start_step: where this segment
    begins. elapsed_s: seconds that earlier segments took. clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        time_limit_s: float,
        start_step: int,
        steps_per_epoch: int,
        *,
        elapsed_s: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._time_limit_s, self._start_step = total_steps, time_limit_s, start_step
        self._steps_per_epoch, self._earlier_s, self._clock = steps_per_epoch, elapsed_s, clock
        self._console = console or Console(stderr=True)
        self._values: dict[str, Any] = {}
        self._printed_at = -_PLAIN_LINE_EVERY_S
        self._began = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.fields[line]}", markup=False))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=1.0, line="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Shows the figures of a record. On plain output training lines are thinned out; evaluations are not."""
        self._values |= values
        evaluated = [name for name in ("stream", "windows") if f"val/{name}/loss" in values]
        if evaluated:
            figures = "  ".join(
                f"{name} {values[f'val/{name}/loss']:.4f} nats {values[f'val/{name}/bpc']:.4f} bits"
                for name in evaluated
            )
            self.message(f"step {step:,}  validation  {figures}")
        if "sample" in values:
            self.message("\n".join(f"  | {line}" for line in values["sample"].split("\n")))
        if self._bar:
            self._bar.update(self._task, completed=self._done_share(step), line=self._line(step))
        elif "train/loss" in values and self._clock() - self._printed_at >= _PLAIN_LINE_EVERY_S:
            self._printed_at = self._clock()
            self.message(self._line(step))

    def message(self, text: str) -> None:
        """A line, above the bar when there is one."""
        # As Text, so that brackets in a sample are not taken for markup; uncut, so that logs keep whole lines.
        self._console.print(Text(text), soft_wrap=True)

    def _elapsed_s(self) -> float:
        return self._earlier_s + self._clock() - self._began

    def _done_share(self, step: int) -> float:
        """How much of the run is done, 0 to 1, by the limit that is nearer."""
        by_steps = step / self._total_steps if self._total_steps else 0.0
        by_time = self._elapsed_s() / self._time_limit_s if self._time_limit_s else 0.0
        return min(1.0, max(by_steps, by_time))

    def _left_s(self, step: int) -> float:
        limits = []
        made = step - self._start_step
        if self._total_steps and made:
            limits.append((self._total_steps - step) * (self._clock() - self._began) / made)
        if self._time_limit_s:
            limits.append(self._time_limit_s - self._elapsed_s())
        return min(limits, default=0.0)

    def _line(self, step: int) -> str:
        v = self._values
        parts = [f"step {step:,}" + (f"/{self._total_steps:,}" if self._total_steps else "")]
        parts.append(f"epoch {step / self._steps_per_epoch:.2f}")
        if "train/loss" in v:
            parts.append(f"loss {v['train/loss']:.4f}")
            parts.append(f"{v['train/bpc']:.3f} bits/char")
            parts.append(f"{v['train/chars_per_s']:,.0f} chars/s")
            parts.append(f"lr {v['train/lr']:.2e}")
        parts.append(f"left {format_duration(self._left_s(step))}")
        return "  ".join(parts)
