"""`python -m benchmarks.gpu`: see the package's docstring."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.report import failures, tables
from benchmarks.gpu.results import END, Results, read_all
from benchmarks.gpu.setup import Setup, tiny_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Phase(StrEnum):
    """Phases, each a module with a function `run`, in their order."""

    correct = "correct"
    commands = "commands"
    race = "race"
    speed = "speed"


# Seconds after which a phase starts no further check, on a GPU; a quarter more, and it is ended.
_SECONDS = {Phase.correct: 140, Phase.commands: 140, Phase.race: 150, Phase.speed: 80}
_SIDE_BY_SIDE = ((Phase.correct, Phase.commands), (Phase.race,), (Phase.speed,))


@app.command()
def main(
    phase: Annotated[Phase | None, typer.Argument(help="Run one phase in this process.", show_default="all")] = None,
    text: Annotated[str, typer.Option(help="Text, as train/main.py takes it; on a CPU words of its own.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-out"),
    work: Annotated[Path | None, typer.Option(help="Folder for runs.", show_default="temporary")] = None,
) -> None:
    """Check and time the trainer on this machine's GPU."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="charrnn-gpu-") as temporary:
        folder = (work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if phase:
            run_phase(phase, text, out, folder)
            failed = failures({phase: read_all(out)[phase]})
        else:
            unended = run_all(text, out, folder)
            failed = [*unended, *failures(read_all(out))]
            (out / "tables.md").write_text("\n".join(tables(read_all(out))))
            print((out / "tables.md").read_text())
    print(f"failed: {', '.join(failed) or 'none'}")
    raise typer.Exit(bool(failed))


def run_all(text: str, out: Path, work: Path) -> list[str]:
    """Run each phase as a process, so that a CUDA error or a hang harms no other; return those that did not end."""
    for p in Phase:
        (out / f"{p}.json").unlink(missing_ok=True)
    began = time.monotonic()
    for group in _SIDE_BY_SIDE:
        print(f"== {' and '.join(group)} at {time.monotonic() - began:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--text", text, "--out", str(out)]
        running = [subprocess.Popen([*command, "--work", str(work / p), p], start_new_session=True) for p in group]
        limit = time.monotonic() + 1.25 * max(_seconds(p) for p in group)
        try:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(1.0, limit - time.monotonic()))
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the commands that it runs
                process.wait()
    found = read_all(out)
    return [f"{p} (did not end)" for p in Phase if END not in found.get(p, {})]


def _seconds(phase: Phase) -> float:
    """The phase's time; a rehearsal without a GPU may take longer on a busy machine, and must leave nothing out."""
    return _SECONDS[phase] * (1 if torch.cuda.is_available() else 5)


def run_phase(phase: Phase, text: str, out: Path, work: Path) -> None:
    """One phase, in this process."""
    on_gpu = torch.cuda.is_available()
    results = Results(out / f"{phase}.json", _seconds(phase))
    text = str(Path(text).resolve()) if text and Path(text).exists() else text
    setup = Setup(text or ("tinyshakespeare" if on_gpu else str(tiny_text(work))), work, on_gpu)
    if not on_gpu:
        os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # small tensors gain nothing from threads
        torch.set_num_threads(1)
    import_module(f"benchmarks.gpu.{phase}").run(setup, results)
    results.check(END, dict)


if __name__ == "__main__":
    app()
