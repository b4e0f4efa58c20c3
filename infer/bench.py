"""Generation speed of a model file on this machine. numpy only."""

import os
import platform
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime

from charrnn import __version__
from charrnn.errors import ModelFileError, printable
from charrnn.sampling import SamplingOptions
from infer import sandbox
from infer.engine import Engine

STREAMS = (1, 8, 64)
# As many characters take some tenths of a second: long against a clock's grain, short against what a machine does else.
_TURN_S = 0.3
_FIRST_TEXT = (
    "from time import perf_counter as now; t = now(); import infer, onnxruntime; i = now() - t;"
    "import sys; from infer.engine import Engine; m = now(); e = Engine(sys.argv[1] or None); l = now() - m;"
    "s = now(); next(e.generate('', 100, seed=1, past_end=True)); print(i, l, now() - s, now() - t)"
)


def bench(engine: Engine, rounds: int, options: SamplingOptions) -> dict[str, Any]:
    """Measure start-up and speed.

    Args:
        engine: The model.
        rounds: Times that each number is taken, in turn; medians and quartiles are over them.
        options: Of the sampling.

    Returns:
        The report. `streams`: characters/s of all streams together, by number of streams.
    """
    turns = [[chars_per_s(engine, n, options) for n in STREAMS] for _ in range(rounds)]
    starts = [start_up(str(engine.path)) for _ in range(max(3, rounds // 2))]
    return {
        "model": str(engine.path),
        "bytes": engine.path.stat().st_size,
        "precision": engine.metadata.get("charrnn.precision", "fp32"),
        "shape": engine.config["model"],
        "machine": machine(engine),
        "sampling": {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p},
        "rounds": rounds,
        "start": {name: spread([s[name] for s in starts]) for name in starts[0]},
        "streams": {n: spread(list(taken)) for n, taken in zip(STREAMS, zip(*turns, strict=True), strict=True)},
    }


def chars_per_s(engine: Engine, streams: int, options: SamplingOptions, *, in_graph: bool = True) -> float:
    """Return characters/s of all streams together, without the prompt and loading."""
    prompt = np.array([engine.vocab.start_id])
    drawn = engine.drawn(prompt, 10**9, options, range(streams), in_graph=in_graph)
    for _ in range(6):  # the first runs find cold caches, and the loop's runs have not got their length
        next(drawn)
    count, began = 0, perf_counter()
    while (seconds := perf_counter() - began) < _TURN_S:
        count += next(drawn).size
    return count / seconds


def start_up(path: str) -> dict[str, float]:
    """Return seconds of a new process: to import onnxruntime, to load the model, to its first text, and in all."""
    run = sandbox.python(["-c", _FIRST_TEXT, path])
    if run.returncode:
        raise ModelFileError(f"{path} could not be opened again: {' '.join(run.stderr.decode().split())[-200:]}")
    return dict(zip(("imports", "load", "first", "whole"), map(float, run.stdout.split()), strict=True))


def spread(values: list[float]) -> dict[str, float]:
    """Return the quartiles of two or more values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


def machine(engine: Engine) -> dict[str, Any]:
    """Return the hardware and versions."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "charrnn": __version__,
        "threads": engine.threads,
    }


def cpu_name() -> str:
    """Return the processor's product name where Linux has it, else its family."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> str:
    """Return the report as a table."""
    model, here = report["shape"], report["machine"]
    one = report["streams"][1]["median"]
    lines = [
        f"model      {printable(report['model'])}: {model['rnn']} {model['num_layers']} x {model['hidden_dim']}, "
        f"{printable(report['precision'])}, {report['bytes'] / 2**20:.2f} MiB",
        f"machine    {here['cpu']}, {here['cores']} cores, {here['system']}; onnxruntime {here['onnxruntime']}, "
        f"{here['threads']} thread(s)",
        f"measured   {report['rounds']} rounds; median (quartiles)",
        "",
        f"start      imports {_seconds(report['start']['imports'])}, load {_seconds(report['start']['load'])}, first "
        f"text {_seconds(report['start']['first'])}; in all {_seconds(report['start']['whole'])}",
        "",
        f"{'':<22}{'characters/s':>38}{'us a character':>16}{'of one stream':>15}",
    ]
    for n, figures in report["streams"].items():
        middle = figures["median"]
        span = f"{middle:,.0f} ({figures['q1']:,.0f} to {figures['q3']:,.0f})"
        name = f"{n} stream{'s' if n > 1 else ''}"
        lines.append(f"{name:<22}{span:>38}{1e6 / middle:>16.1f}{middle / one:>14.2f}x")
    return "\n".join(lines)


def _seconds(figures: dict[str, float]) -> str:
    return f"{figures['median']:.3f} s"
