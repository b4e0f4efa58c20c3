"""What the benchmarks share: the machine line, rounds in turns, quartiles and tables."""

import ctypes
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from charrnn.cli import run_command
from charrnn.cores import cores

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "accelerate", "onnxruntime")
# Parameters of mallopt(3), and the most that glibc raises the first to by itself; the second follows at twice that.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD = -1, -3, 32 << 20


def machine_line() -> str:
    """Formats CPU, usable cores, versions and UTC time: the first line of every benchmark."""
    from infer.bench import cpu_name  # imports onnxruntime

    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"machine  {cpu_name()}, {cores()} cores; {versions}; {datetime.now(UTC).isoformat(timespec='minutes')}"


class Cell(StrEnum):
    """What --rnn names."""

    GRU = "GRU"
    LSTM = "LSTM"


# Options of the commands that build a model.
Rnn = Annotated[Cell, typer.Option(help="Recurrent cell.")]
HiddenDim = Annotated[int, typer.Option(help="Width of a layer's state.", min=1)]
NumLayers = Annotated[int, typer.Option(help="Recurrent layers.", min=1)]
SeqLen = Annotated[int, typer.Option(help="Characters of a window.", min=1)]


@dataclass(frozen=True)
class Quartiles:
    """Quartiles over rounds."""

    q1: float
    median: float
    q3: float

    def show(self, form: str = ",.0f", scale: float = 1) -> str:
        """Formats as `median (q1 to q3)`, each value multiplied by `scale`."""
        q1, median, q3 = (f"{value * scale:{form}}" for value in (self.q1, self.median, self.q3))
        return f"{median} ({q1} to {q3})"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Returns the quartiles of one or more values, interpolated between them."""
    return Quartiles(*statistics.quantiles([*values] * (1 if len(values) > 1 else 2), n=4, method="inclusive"))


def ratios(values: Sequence[float], base: Sequence[float]) -> Quartiles:
    """Returns the quartiles of the ratios to `base` within each round."""
    return quartiles([value / reference for value, reference in zip(values, base, strict=True)])


def in_turns(sides: Mapping[str, Callable[[], T]], rounds: int, warmup: int = 0) -> dict[str, list[T]]:
    """Calls every side once a round, so that a machine that slows down does so for all of them.

    Args:
        sides: Name to measurement.
        rounds: Rounds whose results are kept.
        warmup: Rounds before them whose results are dropped.

    Returns:
        Name to one result a round.
    """
    taken: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(-warmup, rounds):
        for name, measure in sides.items():
            result = measure()
            if number >= 0:
                taken[name].append(result)
    return taken


def seconds_of(action: Callable[[], object], times: int = 1) -> float:
    """Returns the wall-clock seconds that `action` takes, `times` times; on a GPU, until it is done with the work."""
    torch = sys.modules.get("torch")
    wait = torch.cuda.synchronize if torch and torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        action()
    wait()
    return time.perf_counter() - began


def columns(cells: Sequence[object], widths: Sequence[int]) -> str:
    """Formats a table row: the first cell aligned left, the others right; `widths` as `str.format` takes them."""
    first, *others = zip(map(str, cells), widths, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)


def markdown(cells: Sequence[object]) -> str:
    """Formats a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_head(titles: Sequence[str], numbers: int = 0) -> list[str]:
    """Formats the head of a Markdown table whose last `numbers` columns are aligned right."""
    return [markdown(titles), f"|{'---|' * (len(titles) - numbers)}{'--:|' * numbers}"]


def cli(command: Callable[..., None]) -> typer.Typer:
    """Makes a command line of a function."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def run(command: Callable[..., None]) -> None:
    """Runs it on the process's arguments; a user error is one line on stderr, and its exit code."""
    run_command(cli(command))


def free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# ---- memory of this process


def default_allocator() -> None:
    """Sets glibc's allocator as a program finds it after a block above 32 MiB was freed, with nothing retained."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _DEFAULT_MMAP_THRESHOLD)
        libc.malloc_trim(0)


def reset_peak_memory() -> int:
    """Resets the peak resident set and returns the present one, in bytes (Linux: proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """Returns a field of /proc/self/status in bytes, such as VmHWM, the peak resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
