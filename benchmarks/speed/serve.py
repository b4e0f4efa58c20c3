"""What `infer serve` makes of the engine's speed, both measured in turns on the same machine.

    python -m benchmarks.speed.serve [--model FILE] [--rounds 3] [--seconds 2]

The engine side is infer.bench's: the graph's loop alone, one thread, in this process, while the server idles. The other
is what one client process receives as text through HTTP. First text: from the connection's start to the first text.
"""

import asyncio
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import machine
from benchmarks.serving import Served, serving, stream
from charrnn.sampling import SamplingOptions
from infer import Engine
from infer.bench import chars_per_s

app = typer.Typer(add_completion=False)

_REQUEST = {"prompt": "The king said: ", "temperature": 0.8, "top_k": 40}
_STREAMS = (1, 64, 512)
_ENDLESS = 10**8


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


async def measure(served: Served, engine: Engine, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Every figure, once a round."""
    options = SamplingOptions(temperature=0.8, top_k=40)
    taken: dict[str, list[float]] = {}

    def note(name: str, *values: float) -> None:
        taken.setdefault(name, []).extend(values)

    await first_text_s(served.port)
    idle_bytes = served.rss_bytes()
    for _ in range(rounds):
        note("first text, alone", *[await first_text_s(served.port) for _ in range(20)])
        note("first text, 64 at once", *await asyncio.gather(*(first_text_s(served.port) for _ in range(64))))
        for count in _STREAMS:
            note(f"engine, {count}", chars_per_s(engine, count, options))
            client = Client(served.port, count)
            await client.until_all_run()
            await asyncio.sleep(0.5)
            note(f"server, {count}", await client.rate(seconds))
            if count == 64:
                newcomers = [await first_text_s(served.port) for _ in range(10)]
                note("first text, 64 running", *newcomers)
            if count == _STREAMS[-1]:
                note("memory", (served.rss_bytes() - idle_bytes) / count)
            await client.stop()
            await asyncio.to_thread(served.wait_for, "charrnn_streams_running", 0)
    return taken


def table(taken: dict[str, list[float]], here: dict[str, Any]) -> list[str]:
    """The lines to print."""
    lines = [f"machine  {here['cpu']}, {here['cores']} cores; {here['time']}", ""]
    lines.append(f"{'characters/s':<26}{'engine':>26}{'server':>26}{'ratio':>8}")
    for count in _STREAMS:
        sides = [taken[f"{side}, {count}"] for side in ("engine", "server")]
        shown = [f"{statistics.median(s):,.0f} ({min(s):,.0f} to {max(s):,.0f})" for s in sides]
        ratio = statistics.median(server / alone for alone, server in zip(*sides, strict=True))
        lines.append(f"{f'{count} streams':<26}{shown[0]:>26}{shown[1]:>26}{ratio:>8.2f}")
    lines += ["", f"{'ms':<26}{'p50':>10}{'p99':>10}{'requests':>10}"]
    for name, values in taken.items():
        if name.startswith("first text"):
            p50, p99 = np.percentile(values, [50, 99]) * 1e3
            lines.append(f"{name:<26}{p50:>10.1f}{p99:>10.1f}{len(values):>10}")
    return [*lines, "", f"memory of a stream at {_STREAMS[-1]}: {statistics.median(taken['memory']) / 1024:,.1f} KiB"]


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Model file; the shipped one if none is given.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="Length of a turn of the server.", min=0.1)] = 2.0,
) -> None:
    """Measure throughput, time to first text and memory of infer serve."""
    engine = Engine(model, threads=1)
    with serving("--model", engine.path, "--max-tokens-limit", _ENDLESS, "--max-streams", _STREAMS[-1]) as served:
        taken = asyncio.run(measure(served, engine, rounds, seconds))
        print("\n".join(table(taken, machine())))


if __name__ == "__main__":
    app()
