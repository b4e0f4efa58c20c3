"""Generation speed of a model file on this machine, and what its memory bandwidth allows. numpy only."""

import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
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
from infer.model_file.layout import NUM_GATES

STREAMS = (1, 8, 64)
# As many characters take some tenths of a second: long against a clock's grain, short against what a machine does else.
_TURN_S = 0.3
# A buffer far larger than caches, and one that fits where a small model's weights do.
_LARGE_BYTES, _SMALL_BYTES = 256 << 20, 1 << 20
_FIRST_TEXT = (
    "from time import perf_counter as now; t = now(); import infer, onnxruntime; i = now() - t;"
    "import sys; from infer.engine import Engine; m = now(); e = Engine(sys.argv[1] or None); l = now() - m;"
    "s = now(); next(e.generate('', 100, seed=1, past_end=True)); print(i, l, now() - s, now() - t)"
)


def bench(engine: Engine, rounds: int, options: SamplingOptions) -> dict[str, Any]:
    """Measure everything.

    Args:
        engine: The model.
        rounds: Times that each number is taken, in turn; medians and quartiles are over them.
        options: Of the sampling.

    Returns:
        The report. `streams`: characters/s of all streams together, by number of streams. `stepped`: one stream sampled
        in numpy. `bare_step`: one stream, session runs of the network alone, per second.
    """
    measures: dict[str, Callable[[], float]] = {str(n): partial(chars_per_s, engine, n, options) for n in STREAMS}
    measures["stepped"] = partial(chars_per_s, engine, 1, options, in_graph=False)
    measures["bare_step"] = lambda: 1 / bare_step_s(engine)
    measures["large"] = partial(bandwidth, _LARGE_BYTES)
    measures["small"] = partial(bandwidth, _SMALL_BYTES)
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    found = {name: spread(values) for name, values in taken.items()}
    starts = [start_up(str(engine.path)) for _ in range(max(3, rounds // 2))]
    size = engine.path.stat().st_size
    return {
        "model": str(engine.path),
        "bytes": size,
        "precision": engine.metadata.get("charrnn.precision", "fp32"),
        "shape": engine.config["model"],
        "machine": machine(engine),
        "sampling": {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p},
        "rounds": rounds,
        "start": {name: spread([s[name] for s in starts]) for name in starts[0]},
        "streams": {n: found[str(n)] for n in STREAMS},
        "stepped": found["stepped"],
        "bare_step": found["bare_step"],
        "weight_bytes_per_char": weight_bytes(engine),
        "bandwidth": {"large": found["large"], "small": found["small"]},
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


def bare_step_s(engine: Engine) -> float:
    """Return seconds of one session run for one character of one stream, nothing sampled."""
    ids, state = np.zeros((1, 1), np.int64), engine.zero_state(1)
    count, began = 0, perf_counter()
    while (seconds := perf_counter() - began) < _TURN_S:
        _, state = engine.step(ids, state)
        count += 1
    return seconds / count


def bandwidth(size: int) -> float:
    """Return bytes/s that one thread reads from a buffer of `size` bytes, by summing it; the best of some tries."""
    buffer = np.ones(size // 8)
    repeats = max(1, (64 << 20) // size)
    best = 0.0
    for _ in range(4):
        began = perf_counter()
        for _ in range(repeats):
            buffer.dot(buffer)
        best = max(best, repeats * size / (perf_counter() - began))
    return best


def weight_bytes(engine: Engine) -> int:
    """Return bytes of weights that one character of one stream reads, the table's unused rows left out."""
    model = engine.config["model"]
    width, gates = model["hidden_dim"], NUM_GATES[model["rnn"]]
    values = (2 * model["num_layers"] - 1) * gates * width * width + width * len(engine.vocab)
    return values * {"fp32": 4, "int8": 1}[engine.metadata.get("charrnn.precision", "fp32")]


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
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "charrnn": __version__,
        "threads": engine.threads,
    }


def _cpu_name() -> str:
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
    rows = [(f"{n} stream{'s' if n > 1 else ''}", figures) for n, figures in report["streams"].items()]
    rows += [("1 stream, stepped", report["stepped"]), ("1, network alone", report["bare_step"])]
    for name, figures in rows:
        middle = figures["median"]
        span = f"{middle:,.0f} ({figures['q1']:,.0f} to {figures['q3']:,.0f})"
        lines.append(f"{name:<22}{span:>38}{1e6 / middle:>16.1f}{middle / one:>14.2f}x")
    read = report["weight_bytes_per_char"]
    lines += ["", f"weights    {read:,} bytes a character: {read * one / 1e9:.1f} GB/s with one stream"]
    for name, size in (("large", _LARGE_BYTES), ("small", _SMALL_BYTES)):
        speed = report["bandwidth"][name]["median"]
        lines.append(
            f"memory     {speed / 1e9:.1f} GB/s from {size >> 20} MiB, one thread: {speed / read:,.0f} characters/s if "
            "reading them were all"
        )
    return "\n".join(lines)


def _seconds(figures: dict[str, float]) -> str:
    return f"{figures['median']:.3f} s"
