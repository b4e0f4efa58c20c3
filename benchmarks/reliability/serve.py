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
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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


def post(body: bytes) -> bytes:
    """A request of a completion."""
    return b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def status_of(port: int, body: bytes) -> int:
    """The status that a POST is answered with; 0 if the connection is closed without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(post(body))
        with suppress(ConnectionError):
            line = (await asyncio.wait_for(reader.readline(), 60)).split()
            return int(line[1]) if line else 0
        return 0
    finally:
        writer.close()


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
    return await _silent(bench, bench.count(1000), b"")


async def slow_loris(bench: Bench) -> tuple[int, int]:
    """Connections that send a header that never ends, one byte at a time, while requests are made."""
    return await _silent(bench, bench.count(200), b"POST /v1/completions HTTP/1.1\r\nX-A: a")


async def _silent(bench: Bench, count: int, head: bytes) -> tuple[int, int]:
    """Connections without a complete request. Held: each is closed, and all requests meanwhile are answered."""
    opened = [await asyncio.open_connection("127.0.0.1", bench.served.port) for _ in range(count)]
    for _, writer in opened:
        writer.write(head)
    requests = 5
    answered = [await end_of(bench.served.port, max_tokens=5) for _ in range(requests)].count("done")

    async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while True:
                    with suppress(TimeoutError):
                        return await asyncio.wait_for(reader.read(1 << 16), 2) == b""
                    if head:
                        writer.write(b"a")
        writer.close()
        return (writer.is_closing() and reader.at_eof()) or reader.exception() is not None

    return count + requests, sum(await asyncio.gather(*(closed(*pair) for pair in opened))) + answered


async def large_bodies(bench: Bench) -> tuple[int, int]:
    """Bodies of 10 MB."""
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    count = bench.count(50)
    statuses = [await status_of(bench.served.port, body) for _ in range(count)]
    return count, statuses.count(413)


async def invalid_bodies(bench: Bench) -> tuple[int, int]:
    """Bodies of random bytes: neither UTF-8 nor JSON."""
    count = bench.count(1000)
    statuses = [
        await status_of(bench.served.port, bench.draw.randbytes(bench.draw.randint(0, 200))) for _ in range(count)
    ]
    return count, statuses.count(400)


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

    async def leave() -> bool:
        async with aclosing(
            stream(bench.served.port, max_tokens=_ENDLESS, prompt="a" * bench.draw.randint(0, 300))
        ) as pieces:
            for _ in range(bench.draw.randint(1, 5)):
                await anext(pieces)
        return True

    left = 0
    for start in range(0, count, 50):
        left += sum(await asyncio.gather(*(leave() for _ in range(min(50, count - start)))))
    return count, left


async def slow_readers(bench: Bench) -> tuple[int, int]:
    """Clients that ask for much and read nothing."""
    count = bench.count(20)
    # As much as may be asked for with log probabilities, and more than is kept for who does not read.
    body = json.dumps({"stream": True, "max_tokens": 1 << 20, "logprobs": 5, "prompt": "a"}).encode()
    sockets, begun = [], "charrnn_time_to_first_char_seconds_count"
    before = bench.served.gauge(begun)
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", bench.served.port))
        client.sendall(post(body))
        sockets.append(client)
    await asyncio.to_thread(bench.served.wait_for, begun, before + count)
    await asyncio.to_thread(bench.served.wait_for, "charrnn_streams_running", 0, 300)
    for client in sockets:
        client.close()
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
            async with aclosing(
                stream(bench.served.port, prompt=prompt, max_tokens=bench.draw.randint(1, 400))
            ) as pieces:
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


async def settled(bench: Bench, files: int, size: int) -> str:
    """What has not come back to where it was, or "nothing"."""
    served = bench.served
    end = time.monotonic() + _SETTLE_S
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
        left = left or await settled(bench, files, size)
        how = (FAULTS[name].__doc__ or "").strip().rstrip(".")
        rows.append([name, how, tried, held, left, f"{time.monotonic() - began:.1f}"])

    await disconnects(bench)  # imports, buffers and the prompt cache reach their size
    files, size = bench.served.open_files(), bench.served.rss_bytes()
    *others, last = FAULTS
    for name in others:
        await inject(name)
    samples = await soak(bench, soak_s)
    await inject(last, await settled(bench, files, size))
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
