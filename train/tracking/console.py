"""Progress and messages on stderr: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from charrnn.cores import UNDISTURBED
from charrnn.errors import escape_control
from charrnn.log import StderrHandler

_PLAIN_LINE_EVERY_S = 5.0
_LONG_ON_CPU_S = 3600.0


def format_duration(seconds: float) -> str:
    """Format as 41s, 3m12s, 2h05m or 4d06h: the two largest units."""
    whole = round(max(0.0, seconds))
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part_size:02d}{part}"
    return f"{whole}s"


def format_share(share: float) -> str:
    """Format in percent: 57%, and below 1% with one significant digit: 0.3%, 0.02%."""
    return f"{share:.0%}" if share >= 0.01 or not share else f"{100 * float(f'{share:.0e}'):g}%"


def pace_line(metrics: Mapping[str, float], left_s: float, device_type: str, cpu_share: float, threads: int) -> str:
    """The training speed and the time left.

    Args:
        metrics: The first record of training.
        left_s: Seconds left at that speed.
        device_type: Of the training device.
        cpu_share: Share of its threads' time that the process had on the cores.
        threads: Their number.
    """
    share = f", {format_share(metrics['train/mfu'])} of the peak" if "train/mfu" in metrics else ""
    speed = f"{metrics['train/chars_per_s']:,.0f} characters/s ({metrics['train/gflops']:,.0f} GFLOP/s{share})"
    line = f"pace      {speed}: about {format_duration(left_s)} left"
    if device_type != "cpu":
        return line
    if left_s > _LONG_ON_CPU_S:
        line += "; for a model in minutes on a CPU leave out --config"
    if threads > 1 and cpu_share < UNDISTURBED:
        line += (
            f"; other processes use these cores: {threads} threads had {cpu_share:.0%} of their time, and fewer may be "
            f"faster (--set train.threads={threads - 1})"
        )
    return line


class ConsoleHandler(StderrHandler):
    """Print log records above the progress bar. Uncut, unlike rich's handler, so that commands can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def show(self, text: str) -> None:
        """Print a line."""
        print_line(self._console, text)


def print_line(console: Console, text: str) -> None:
    """Print a line without markup, so that brackets in a sample are kept, and without wrapping."""
    console.print(Text(text), soft_wrap=True)


class Display:
    """The progress display, a context manager."""

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        share: Callable[[], float],
        remaining_s: Callable[[float], float],
        *,
        start_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display.

        Args:
            total_steps: 0 if only time limits the run.
            steps_per_epoch: Steps of a pass over the training split.
            share: Returns the completed fraction of the run.
            remaining_s: Returns the seconds left at a speed in characters/s.
            start_step: Where this segment begins.
            console: Where to print; stderr by default.
            clock: Seconds from any origin.
        """
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._share, self._remaining_s, self._clock = share, remaining_s, clock
        self._console = console or Console(stderr=True)
        self._step = start_step
        self._values: dict[str, Any] = {}
        self._printed_at = -_PLAIN_LINE_EVERY_S
        self._bar: Live | None = None

    def __enter__(self) -> "Display":
        if self._console.is_interactive:  # a terminal, and not a dumb one
            self._bar = Live(get_renderable=self._render, console=self._console, transient=True, redirect_stdout=False)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def update(self, record: dict[str, Any]) -> None:
        """Show a record. Without a bar, training lines are printed every few seconds, evaluations always."""
        self._step = record["step"]
        self._values = self._values | record  # a new dict, since the bar draws from a thread of its own
        losses = [
            f"{name} {record[f'val/{name}/loss']:.4f} nats {record[f'val/{name}/bpc']:.4f} bits"
            for name in ("stream", "windows")
            if f"val/{name}/loss" in record
        ]
        if losses:
            print_line(self._console, "  ".join([f"step {self._step:,}", "validation", *losses]))
        if "sample" in record:
            # A byte model may well generate a terminal's escape sequences.
            print_line(self._console, "  | " + escape_control(record["sample"]).replace("\n", "\n  | "))
        if not self._bar and "train/loss" in record and self._clock() - self._printed_at >= _PLAIN_LINE_EVERY_S:
            self._printed_at = self._clock()
            print_line(self._console, "  ".join([*self._position(), *self._metrics(), self._time_left()]))

    def _render(self) -> Group:
        """The bar with the position, and below it the metrics: two lines, which fit a terminal of 80 columns."""
        bar = ProgressBar(total=1.0, completed=self._share())
        first = Table.grid(expand=True, padding=(0, 2, 0, 0))
        first.add_column(ratio=1)  # the bar takes what the text leaves
        first.add_column(no_wrap=True)
        first.add_row(bar, Text("  ".join([*self._position(), self._time_left()])))
        return Group(first, Text("  ".join(self._metrics()), no_wrap=True, overflow="ellipsis"))

    def _position(self) -> list[str]:
        total = f"/{self._total_steps:,}" if self._total_steps else ""
        return [f"step {self._step:,}{total}", f"epoch {self._step / self._steps_per_epoch:.2f}"]

    def _metrics(self) -> list[str]:
        values = self._values
        if "train/loss" not in values:
            return []
        return [
            f"loss {values['train/loss']:.4f}",
            f"{values['train/bpc']:.3f} bits/char",
            f"{values['train/chars_per_s']:,.0f} chars/s",
            *([f"mfu {format_share(values['train/mfu'])}"] if "train/mfu" in values else []),
            f"lr {values['train/lr']:.2e}",
        ]

    def _time_left(self) -> str:
        """By the nearer limit, at the latest speed."""
        speed = self._values.get("train/chars_per_s")
        return f"left {format_duration(self._remaining_s(speed)) if speed else '?'}"
