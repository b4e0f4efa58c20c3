"""`infer serve` in a process of its own, and a client that costs little beside it; tests use both."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from benchmarks.common import ROOT

_START_S = 60


@dataclass
class Served:
    """A server that takes requests. log: its standard error."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    @property
    def port(self) -> int:
        """On 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    def lines(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def processes(self) -> list[psutil.Process]:
        """The server, and its workers after it."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children()]

    def worker_pids(self) -> list[int]:
        """Its children."""
        return [process.pid for process in self.processes()[1:]]

    def rss_bytes(self) -> int:
        """Resident memory of the server and its workers."""
        return sum(process.memory_info().rss for process in self.processes())

    def open_files(self) -> int:
        """File descriptors of the server itself."""
        return self.processes()[0].num_fds()

    def gauge(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels, or over those that contain `label`."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{name}((?:\{{.*\}})?) (\S+)$", text, re.M)
        return sum(float(value) for labels, value in found if label in labels)

    def wait_for(self, name: str, value: float, timeout: float = 30) -> None:
        """Waits until a metric has a value. Raises: TimeoutError."""
        end = time.monotonic() + timeout
        while (found := self.gauge(name)) != value:
            if time.monotonic() > end:
                raise TimeoutError(f"{name} is {found}, not {value}")
            time.sleep(0.02)

    def stop(self, timeout: float = 30) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextmanager
def serving(*arguments: object, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server on a free port, until the end of the block."""
    command = [sys.executable, "-m", "infer.cli", "serve", "--port", "0", "--log-format", "json", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
            process = subprocess.Popen(command, stderr=file, stdin=subprocess.DEVNULL, env=environment)
        try:
            yield Served(process, _address(process, log), log)
        finally:
            process.kill()
            process.wait()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """What the log says that is served. Raises: RuntimeError with the log when it says nothing of it."""
    end = time.monotonic() + _START_S
    while not (found := re.search(r"serving .* on (http://\S+?)[\s\"]", log.read_text())):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(log.read_text())
        time.sleep(0.05)
    return found[1]


async def stream(port: int, **fields: Any) -> AsyncGenerator[str]:
    """The pieces of text of a streamed completion. Closing the iterator disconnects.

    Raises: ConnectionError when the server answers with an error, or breaks off.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    body = json.dumps({"stream": True} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            raise ConnectionError(f"status {status}")
        while (line := await reader.readline()) != b"data: [DONE]\n":
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ConnectionError(event["error"]["message"])
                yield event["choices"][0]["text"]
            elif not line:
                raise ConnectionError("the stream broke off")
    finally:
        writer.close()
