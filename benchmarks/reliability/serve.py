"""What `infer serve` does when clients and machines misbehave: each fault is injected, then the server is looked over.

    python -m benchmarks.reliability.serve [--model FILE] [--scale 1.0] [--soak 600]

After every fault the same server has to take requests, with no row running, and within some of the file descriptors and
memory that it had before.
"""

import asyncio
import json
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from benchmarks.common import machine_line, markdown, markdown_head, run
from benchmarks.serving import Served, serving, stream

_COLUMNS = ("fault", "how injected", "tried", "held", "left behind", "seconds")
_ENDLESS = 10**8
_DRAIN_S = 1.0
# What allocators and the metrics of new statuses keep.
_SPARE_BYTES, _SPARE_FILES = 48 << 20, 16
_SETTLE_S = 60.0


# Seconds since the soak began, bytes of memory, file descriptors and rows that run.
Sample = tuple[float, int, int, int]


@dataclass
class Bench:
    """A server to be tried. scale: of the numbers of connections and requests. draw: what chance decides."""

    served: Served
    scale: float
    draw: random.Random

    def count(self, full: int) -> int:
        """How many of something, at this scale."""
        return max(2, int(full * self.scale))


async def statuses_of(url: str, bodies: Iterable[bytes]) -> list[int]:
    """The status that each POST is answered with, on a connection of its own."""
    headers = {"Connection": "close"}
    async with httpx.AsyncClient(timeout=60) as client:
        return [(await client.post(f"{url}/v1/completions", content=b, headers=headers)).status_code for b in bodies]


async def end_of(port: int, **fields: Any) -> str:
    """How a stream ends: "done", or what it is told."""
    try:
        async with aclosing(stream(port, **fields)) as pieces:
            async for _ in pieces:
                pass
    except ConnectionError as error:
        return str(error)
    return "done"


async def killed_worker(bench: Bench) -> tuple[int, int]:
    """kill -9 of the worker while streams run."""
    count = bench.count(32)
    ends = [asyncio.create_task(end_of(bench.served.port, max_tokens=_ENDLESS, seed=i)) for i in range(count)]
    await asyncio.to_thread(bench.served.wait_for, "charrnn_streams_running", count)
    for pid in bench.served.worker_pids():
        os.kill(pid, signal.SIGKILL)
    told = await asyncio.gather(*ends)
    await asyncio.to_thread(bench.served.wait_for, "charrnn_workers_ready", 1)
    return count, sum("worker" in end for end in told)


async def half_open(bench: Bench) -> tuple[int, int]:
    """Connections that never send anything, while requests are made."""
    return await _silent(bench, bench.count(1000), b"", b"")


async def slow_loris(bench: Bench) -> tuple[int, int]:
    """Connections that send a header that never ends, one byte at a time, while requests are made."""
    return await _silent(bench, bench.count(200), b"POST /v1/completions HTTP/1.1\r\nX-A: a", b"a")


async def _silent(bench: Bench, count: int, head: bytes, more: bytes) -> tuple[int, int]:
    """Connections without a complete request. Held: each is closed, and all requests meanwhile are answered."""
    opened = [await asyncio.open_connection("127.0.0.1", bench.served.port) for _ in range(count)]
    for _, writer in opened:
        writer.write(head)
    requests = 5
    answered = [await end_of(bench.served.port, max_tokens=5) for _ in range(requests)].count("done")

    async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            async with asyncio.timeout(_SETTLE_S):
                while True:
                    with suppress(TimeoutError):
                        if await asyncio.wait_for(reader.read(1 << 16), 2) == b"":
                            return True
                    writer.write(more)
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        finally:
            writer.close()

    return count + requests, sum(await asyncio.gather(*(closed(*pair) for pair in opened))) + answered


async def large_bodies(bench: Bench) -> tuple[int, int]:
    """Bodies of 10 MB."""
    body, count = json.dumps({"prompt": "a" * 10_000_000}).encode(), bench.count(50)
    return count, (await statuses_of(bench.served.url, [body] * count)).count(413)


async def invalid_bodies(bench: Bench) -> tuple[int, int]:
    """Bodies of random bytes: neither UTF-8 nor JSON."""
    bodies = [bench.draw.randbytes(bench.draw.randint(0, 200)) for _ in range(bench.count(1000))]
    return len(bodies), (await statuses_of(bench.served.url, bodies)).count(400)


async def rapid_connects(bench: Bench) -> tuple[int, int]:
    """Connections that are opened and closed at once."""
    count = bench.count(10_000)
    made = 0
    for _ in range(count):
        with suppress(OSError), socket.create_connection(("127.0.0.1", bench.served.port), 5):
            made += 1
        if made % 64 == 0:
            await asyncio.sleep(0)
    return count, made


async def disconnects(bench: Bench) -> tuple[int, int]:
    """Clients that leave at a random moment of their stream."""
    count = bench.count(500)

    async def leave() -> None:
        prompt, texts = "a" * bench.draw.randint(0, 300), bench.draw.randint(1, 5)
        async with aclosing(stream(bench.served.port, max_tokens=_ENDLESS, prompt=prompt)) as pieces:
            for _ in range(texts):
                await anext(pieces)

    for start in range(0, count, 50):
        await asyncio.gather(*(leave() for _ in range(min(50, count - start))))
    return count, count


async def slow_readers(bench: Bench) -> tuple[int, int]:
    """Clients that ask for much and read nothing."""
    count, begun = bench.count(20), "charrnn_time_to_first_char_seconds_count"
    before = bench.served.gauge(begun)
    # As much as may be asked for with log probabilities, and more than is kept for who does not read.
    body = json.dumps({"stream": True, "max_tokens": 1 << 20, "logprobs": 5, "prompt": "a"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with ExitStack() as opened:
        for _ in range(count):
            client = opened.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", bench.served.port))
            client.sendall(head + body)
        await asyncio.to_thread(bench.served.wait_for, begun, before + count)
        await asyncio.to_thread(bench.served.wait_for, "charrnn_streams_running", 0, 300)
    return count, count


async def sigterm(bench: Bench) -> tuple[int, int]:
    """SIGTERM while streams run: short ones finish, long ones are told, exit code 0."""
    count = bench.count(50)
    lengths = [_ENDLESS if i % 2 else 20 for i in range(count)]
    ends = [asyncio.create_task(end_of(bench.served.port, max_tokens=n, seed=n)) for n in lengths]
    await asyncio.to_thread(bench.served.wait_for, "charrnn_streams_running", count // 2)
    code = await asyncio.to_thread(bench.served.stop, 60)
    told = await asyncio.gather(*ends)
    right = ["shutting down" in end if n == _ENDLESS else end == "done" for n, end in zip(lengths, told, strict=True)]
    return count, sum(right) if code == 0 else 0


FAULTS: dict[str, Callable[[Bench], Awaitable[tuple[int, int]]]] = {
    "kill -9 of the worker": killed_worker,
    "half-open connections": half_open,
    "slow-loris": slow_loris,
    "bodies of 10 MB": large_bodies,
    "invalid bodies": invalid_bodies,
    "rapid connects": rapid_connects,
    "disconnects": disconnects,
    "slow readers": slow_readers,
    "SIGTERM": sigterm,  # the last: it ends the server
}


async def soak(bench: Bench, seconds: float) -> list[Sample]:
    """Clients that come and go at random. Returns: samples, some times a minute."""
    end, began = time.monotonic() + seconds, time.monotonic()
    samples: list[Sample] = []

    async def client() -> None:
        while time.monotonic() < end:
            prompt, leave_after = "a b " * bench.draw.randint(0, 100), bench.draw.choice([1, 3, 10**9])
            fields = {"prompt": prompt, "max_tokens": bench.draw.randint(1, 400)}
            async with aclosing(stream(bench.served.port, **fields)) as pieces:
                for _ in range(leave_after):
                    if await anext(pieces, None) is None:
                        break

    clients = [asyncio.create_task(client()) for _ in range(bench.count(64))]
    while time.monotonic() < end:
        await asyncio.sleep(min(10.0, seconds / 20))
        running = await asyncio.to_thread(bench.served.gauge, "charrnn_streams_running")
        samples.append((time.monotonic() - began, bench.served.rss_bytes(), bench.served.open_files(), int(running)))
    await asyncio.gather(*clients)
    return samples


async def left_behind(bench: Bench, files: int, size: int) -> str:
    """What has not come back to where it was, or "nothing"."""
    served, end = bench.served, time.monotonic() + _SETTLE_S
    while True:
        rows, now_files, now_size = served.gauge("charrnn_streams_running"), served.open_files(), served.rss_bytes()
        if rows == 0 and now_files <= files + _SPARE_FILES and now_size <= size + _SPARE_BYTES:
            return "nothing" if await end_of(served.port, max_tokens=5) == "done" else "no requests are taken"
        if time.monotonic() > end:
            return f"{rows:.0f} rows, {now_files - files} files, {(now_size - size) >> 20} MiB more than before"
        await asyncio.sleep(0.2)


async def try_all(bench: Bench, soak_s: float) -> tuple[list[list[object]], list[Sample]]:
    """Injects every fault. Returns: the table's rows, and the soak's samples."""
    rows: list[list[object]] = []

    async def inject(name: str, left: str = "") -> None:
        began = time.monotonic()
        tried, held = await FAULTS[name](bench)
        left = left or await left_behind(bench, files, size)
        how = (FAULTS[name].__doc__ or "").strip().rstrip(".")
        rows.append([name, how, tried, held, left, f"{time.monotonic() - began:.1f}"])

    await disconnects(bench)  # imports, buffers and the prompt cache reach their size
    files, size = bench.served.open_files(), bench.served.rss_bytes()
    *others, last = FAULTS
    for name in others:
        await inject(name)
    samples = await soak(bench, soak_s)
    await inject(last, await left_behind(bench, files, size))
    return rows, samples


def serve(
    model: Annotated[Path | None, typer.Option(help="Model file; the shipped one if none is given.")] = None,
    scale: Annotated[float, typer.Option(help="Of the numbers of connections and requests.", min=0.001)] = 1.0,
    soak_s: Annotated[float, typer.Option("--soak", help="Seconds of the soak.", min=0)] = 600.0,
    seed: Annotated[int, typer.Option(help="What chance is drawn from.")] = 1,
) -> None:
    """Inject faults into infer serve, and print what it makes of them."""
    models = [] if model is None else ["--model", model]
    with serving(*models, "--max-tokens-limit", _ENDLESS, "--drain-timeout", _DRAIN_S) as served:
        rows, samples = asyncio.run(try_all(Bench(served, scale, random.Random(seed)), soak_s))
    print(f"{machine_line()}\n")
    print("\n".join([*markdown_head(_COLUMNS), *map(markdown, rows)]))
    print("\n".join(["", *markdown_head(["soak, seconds", "MiB", "files", "rows"])]))
    for fifth in np.array_split(np.array(samples), 5):
        if len(fifth):
            seconds, size, *others = zip(fifth.min(axis=0), fifth.max(axis=0), strict=True)
            print(markdown([*(f"{low:.0f} to {high:.0f}" for low, high in (seconds, np.divide(size, 2**20), *others))]))
    if any(row[2] != row[3] or row[4] != "nothing" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(serve)
