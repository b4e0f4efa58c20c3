"""What `infer serve` makes of the engine's speed, both measured in turns on the same machine.

    python -m benchmarks.speed.serve [--model FILE] [--rounds 3] [--seconds 2]

The engine side is what infer bench measures: the graph's loop alone, one thread, in this process, while the server
idles. The other is what one client process receives as text through HTTP. First text: from the connection's start to
the first text.

CPU is processor time a character: of the engine alone, of the worker that serves, of the HTTP process. It tells what
serving costs on a machine that is busy with other work too, where characters a second tell what was left.
"""

import asyncio
import os
import statistics
import time
from collections import defaultdict
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import columns, machine_line, ratios, run
from benchmarks.serving import Served, serving, stream
from charrnn.sampling import SamplingOptions
from infer import Engine

_REQUEST = {"prompt": "The king said: ", "temperature": 0.8, "top_k": 40}
_STREAMS = (1, 64, 512)
_ENDLESS = 10**8
_SIDES = ("engine rate", "engine cpu", "server rate", "worker cpu", "http cpu")
_WIDTHS = (8, 22, 22, 7, 9, 9, 7, 9)


class Client:
    """Streams that are read until they are stopped. chars: how many each has received."""

    def __init__(self, port: int, count: int) -> None:
        self.chars = [0] * count
        self._tasks = [asyncio.create_task(self._read(port, i)) for i in range(count)]

    async def _read(self, port: int, i: int) -> None:
        async with aclosing(stream(port, seed=i, max_tokens=_ENDLESS, **_REQUEST)) as pieces:
            async for piece in pieces:
                self.chars[i] += len(piece)

    async def until_all_run(self) -> None:
        """Waits until every stream has had some text."""
        while not all(self.chars):
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.02)

    async def rate(self, seconds: float) -> float:
        """Characters a second of all."""
        began, before = time.perf_counter(), sum(self.chars)
        await asyncio.sleep(seconds)
        return (sum(self.chars) - before) / (time.perf_counter() - began)

    async def stop(self) -> None:
        """Disconnects."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def first_text_s(port: int) -> float:
    """Seconds to the first text of a request."""
    began = time.perf_counter()
    async with aclosing(stream(port, max_tokens=200, **_REQUEST)) as pieces:
        await anext(pieces)
        seconds = time.perf_counter() - began
        async for _ in pieces:
            pass
    return seconds


def engine_side(engine: Engine, count: int, seconds: float) -> tuple[float, float]:
    """Characters a second of the engine alone, and its processor seconds a character."""
    options = SamplingOptions(temperature=0.8, top_k=40)
    drawn = engine.drawn(np.array([engine.vocab.start_id]), _ENDLESS, options, range(count))
    for _ in range(6):
        next(drawn)
    chars, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        chars += next(drawn).size
    return chars / (time.perf_counter() - began), (time.process_time() - cpu) / chars


async def server_side(served: Served, client: Client, seconds: float) -> tuple[float, float, float]:
    """Characters a second that clients receive, and the worker's and the HTTP process's processor seconds for each."""
    processes, chars = served.processes(), sum(client.chars)
    before = [sum(process.cpu_times()[:2]) for process in processes]
    rate = await client.rate(seconds)
    http, worker = (sum(process.cpu_times()[:2]) - cpu for process, cpu in zip(processes, before, strict=True))
    chars = sum(client.chars) - chars
    return rate, worker / chars, http / chars


async def measure(served: Served, engine: Engine, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Every figure, once a round."""
    taken: dict[str, list[float]] = defaultdict(list)
    port = served.port
    await asyncio.gather(*(first_text_s(port) for _ in range(8)))
    idle_bytes = served.rss_bytes()
    for _ in range(rounds):
        taken["first text, alone"] += [await first_text_s(port) for _ in range(20)]
        taken["first text, 64 at once"] += await asyncio.gather(*(first_text_s(port) for _ in range(64)))
        for count in _STREAMS:
            alone = engine_side(engine, count, seconds)
            client = Client(port, count)
            await client.until_all_run()
            await asyncio.sleep(0.5)
            for name, value in zip(_SIDES, alone + await server_side(served, client, seconds), strict=True):
                taken[f"{name}, {count}"].append(value)
            if count == 64:
                taken["first text, 64 running"] += [await first_text_s(port) for _ in range(10)]
            if count == _STREAMS[-1]:
                taken["memory"].append((served.rss_bytes() - idle_bytes) / count)
            await client.stop()
            await asyncio.to_thread(served.wait_for, "charrnn_streams_running", 0)
    return taken


def table(taken: dict[str, list[float]]) -> list[str]:
    """The lines to print."""
    lines = [f"{'characters/s':>33}{'':>18}{'CPU us a character':>34}"]
    lines.append(columns(["streams", "engine", "server", "ratio", "engine", "worker", "ratio", "HTTP"], _WIDTHS))
    for count in _STREAMS:
        rates = [taken[f"{side} rate, {count}"] for side in ("engine", "server")]
        cpu = [1e6 * statistics.median(taken[f"{side} cpu, {count}"]) for side in ("engine", "worker", "http")]
        cells = [f"{statistics.median(s):,.0f} ({min(s):,.0f}-{max(s):,.0f})" for s in rates]
        numbers = [ratios(*reversed(rates)).median, *cpu[:2], cpu[0] / cpu[1], cpu[2]]
        lines.append(columns([count, *cells, *(f"{number:.2f}" for number in numbers)], _WIDTHS))
    lines += ["", f"{'ms':<26}{'p50':>10}{'p99':>10}{'requests':>10}"]
    for name, values in taken.items():
        if name.startswith("first text"):
            p50, p99 = np.percentile(values, [50, 99]) * 1e3
            lines.append(f"{name:<26}{p50:>10.1f}{p99:>10.1f}{len(values):>10}")
    return [*lines, "", f"memory per stream at {_STREAMS[-1]}: {statistics.median(taken['memory']) / 1024:,.1f} KiB"]


def serve(
    model: Annotated[Path | None, typer.Option(help="Model file; the shipped one if none is given.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="Length of a turn of the server.", min=0.1)] = 2.0,
) -> None:
    """Measure throughput, time to first text and memory of infer serve."""
    engine = Engine(model, threads=1)
    with serving("--model", engine.path, "--max-tokens-limit", _ENDLESS, "--max-streams", _STREAMS[-1]) as served:
        taken = asyncio.run(measure(served, engine, rounds, seconds))
    print(f"{machine_line()}; load average {os.getloadavg()[0]:.1f}\nmodel    {engine.path}\n")
    print("\n".join(table(taken)))


if __name__ == "__main__":
    run(serve)
