"""`infer serve` in a process of its own, for tests and for what benchmarks/ does to it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Served:
    """A server that takes requests. log: its standard error."""

    process: subprocess.Popen
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def worker_pids(self) -> list[int]:
        """Its children."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def gauge(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))

    def wait_for(self, name: str, value: float, timeout: float = 20) -> None:
        """Until a metric has a value."""
        import time

        end = time.monotonic() + timeout
        while (found := self.gauge(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def stop(self, timeout: float = 20) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "infer.cli", "serve", *map(str, arguments)]


@contextmanager
def serving(*arguments: object, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server on a free port, until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command("--port", 0, "--log-format", "json", *arguments), stderr=file, stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
            )  # fmt: skip
        try:
            yield Served(process, address(process, log), log)
        finally:
            process.kill()
            process.wait()


def address(process: subprocess.Popen, log: Path) -> str:
    """What the log says that is served; the pipe's end tells of a server that gave up."""
    import time

    end = time.monotonic() + 60
    while not (found := re.search(r"serving .* on (http://\S+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return found[1]
