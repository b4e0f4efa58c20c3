"""Worker processes of one model: start, submit jobs, dispatch events, restart."""

import asyncio
import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

from charrnn.vocab import Vocab
from infer import sandbox
from infer.server.errors import ApiError
from infer.server.metrics import Metrics
from infer.server.ticket import Ticket

log = logging.getLogger("charrnn.serve")

# Minimum interval between events of a stream, and maximum rate of events of all streams.
_SEND_EVERY_S, _EVENTS_PER_S = 0.02, 2000
_MOST_PROMPT_BYTES = 64 << 20  # of outstanding prompts and states
_MOST_LINE_BYTES = 1 << 30
_RESTART_S, _MOST_RESTART_S = 0.1, 5.0
_ids = itertools.count()


class Worker:
    """One worker process and the tickets of its jobs."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._process: asyncio.subprocess.Process | None = None
        self.tickets: dict[int, Ticket] = {}
        self.ready = self.closing = False
        self.counts = {"running": 0, "waiting": 0}
        self._dirty: set[Ticket] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sent = 0.0

    @property
    def choices(self) -> int:
        """Outstanding choices."""
        return sum(ticket.choices for ticket in self.tickets.values())

    def submit(self, message: dict[str, Any], stream: bool, ready: asyncio.Event) -> Ticket:
        """Send a job."""
        ticket = Ticket(self.cancel, message, stream, ready, self._pool.metrics)
        self.tickets[ticket.id] = ticket
        self._write(message)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a job, unless it is over."""
        if self.tickets.pop(ticket.id, None):
            self._write({"cancel": ticket.id})

    def _write(self, message: dict[str, Any]) -> None:
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def run(self) -> None:
        """Start the process, and restart it whenever it exits, until `close`."""
        delay = _RESTART_S
        while not self.closing:
            try:
                was_ready = await self._run_process()
            except OSError as error:  # too many processes or open files, or no memory
                was_ready = False
                log.error("cannot start a worker of %s: %s; trying again", self._pool.name, error)
            if not self.closing:
                delay = _RESTART_S if was_ready else min(2 * delay, _MOST_RESTART_S)
                await asyncio.sleep(delay)

    async def _run_process(self) -> bool:
        """Run one process until it exits; return whether it became ready. Raises: OSError if it cannot be started."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "infer.server.worker", *self._pool.arguments, limit=_MOST_LINE_BYTES,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=sandbox.environment(),
        )  # fmt: skip
        was_ready = await self._listen(self._process)
        code = await self._process.wait()
        self.ready, self.counts = False, {"running": 0, "waiting": 0}
        for ticket in self.tickets.values():
            ticket.fail(ApiError(500, "the worker of this request ended; send the request again", code="worker_lost"))
        self.tickets.clear()
        self._pool.changed()
        if not self.closing:
            log.error("worker %d of %s ended with code %d; restarting", self._process.pid, self._pool.name, code)
            self._pool.metrics.restarts.inc()
        return was_ready

    async def _listen(self, process: asyncio.subprocess.Process) -> bool:
        """Dispatch the process's messages until it exits; return whether it became ready."""
        assert process.stdout is not None
        was_ready = False
        async for line in process.stdout:
            if not line.endswith(b"\n"):  # killed while writing
                break
            message = json.loads(line)
            if "events" in message:
                self._take(message)
            elif "ready" in message:
                self.ready = was_ready = True
                self._pool.facts = message["ready"] | {"vocab": Vocab.from_json(message["ready"]["vocab"])}
                self._pool.changed()
            else:
                self._pool.failed(message["failed"])
        return was_ready

    def _take(self, message: dict[str, Any]) -> None:
        for event in message["events"]:
            ticket = self.tickets.get(event["id"])
            if ticket is None:
                continue
            if "error" in event:
                del self.tickets[ticket.id]
                ticket.fail(ApiError(event.get("status", 500), event["error"], event.get("param")))
                continue
            ticket.push(event)
            if ticket.finished:
                self.tickets.pop(ticket.id, None)
            else:
                self._dirty.add(ticket)
        if counts := message["counts"]:
            self._count(counts)
        if self._dirty and self._timer is None:
            loop = asyncio.get_running_loop()
            interval = max(_SEND_EVERY_S, len(self.tickets) / _EVENTS_PER_S)
            self._timer = loop.call_at(max(loop.time(), self._sent + interval), self._wake)

    def _count(self, counts: dict[str, Any]) -> None:
        """Add a worker's counts since its last report to the metrics."""
        self.counts = {name: counts[name] for name in self.counts}
        for name in ("generated", "read", "hits", "misses"):
            getattr(self._pool.metrics, name).inc(counts[name])
        for rows in counts["groups"]:
            self._pool.metrics.rows.observe(rows)

    def _wake(self) -> None:
        """Wake the readers of all streams with new text."""
        self._sent, self._timer = asyncio.get_running_loop().time(), None
        for ticket in self._dirty:
            ticket.wake()
        self._dirty.clear()

    async def close(self) -> None:
        """Close the process's stdin, and kill the process if it does not exit."""
        self.closing = True
        if self._process and self._process.stdin:
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 2)
            except TimeoutError:
                self._process.kill()


class Pool:
    """The workers of one model.

    Args:
        name: Model name in the API.
        path: Model file.
        metrics: Of the server.
        workers: Number of processes.
        threads: CPU threads per process.
        max_streams: Concurrent choices per process.
        max_queue: Queued choices.

    Attributes:
        facts: A worker's description of the model; None until one is ready.
        failure: Why the model file was refused at startup, if it was.
    """

    def __init__(
        self, name: str, path: Path, metrics: Metrics, workers: int, threads: int, max_streams: int, max_queue: int
    ) -> None:
        self.name, self.metrics = name, metrics.of(name)
        self.arguments = (str(path), str(threads), str(max_streams))
        self.capacity = workers * max_streams + max_queue
        self.facts: dict[str, Any] | None = None
        self.failure: str | None = None
        self.workers = [Worker(self) for _ in range(workers)]
        self.startup_finished = asyncio.Event()  # set once a worker is ready or the file is refused
        self.metrics.running.set_function(lambda: sum(w.counts["running"] for w in self.workers))
        self.metrics.waiting.set_function(lambda: sum(w.counts["waiting"] for w in self.workers))
        self.changed()

    @property
    def ready(self) -> bool:
        """Whether a worker accepts jobs."""
        return any(worker.ready for worker in self.workers)

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary. Raises: ApiError while no worker has loaded it."""
        if self.facts is None:
            raise ApiError(503, f"model {self.name} is loading", code="loading", retry_after=1)
        return self.facts["vocab"]

    def changed(self) -> None:
        """Update after a worker became ready or exited."""
        self.metrics.ready.set(sum(worker.ready for worker in self.workers))
        if self.ready:
            self.startup_finished.set()

    def failed(self, message: str) -> None:
        """Record that a worker could not open the model."""
        log.error("model %s: %s", self.name, message)
        if self.facts is None:
            self.failure = message
            self.startup_finished.set()

    def check_room(self, choices: int, size: int) -> None:
        """Raises: ApiError if so many choices, with prompts and states of `size` bytes, exceed the capacity."""
        if choices > self.capacity:
            raise ApiError(400, f"{choices} choices at once are more than the {self.capacity} of this server", "n")
        if size > _MOST_PROMPT_BYTES:
            limit = f"more than {_MOST_PROMPT_BYTES:,}; send fewer prompts"
            raise ApiError(400, f"the prompts, each with the state, take {size:,} bytes, {limit}", "prompt")
        tickets = [ticket for worker in self.workers for ticket in worker.tickets.values()]
        outstanding = sum(ticket.choices for ticket in tickets)
        size += sum(ticket.bytes for ticket in tickets)
        if outstanding + choices > self.capacity or size > _MOST_PROMPT_BYTES:
            self.metrics.rejected.inc()
            limit = f"{outstanding} choices run or wait, of {self.capacity} (--max-streams, --max-queue)"
            raise ApiError(429, f"the queue is full: {limit}; try again later", code="queue_full", retry_after=1)

    def submit(self, message: dict[str, Any], stream: bool, ready: asyncio.Event) -> Ticket:
        """Send a job to the worker with the fewest choices. Raises: ApiError if no worker is ready."""
        workers = [worker for worker in self.workers if worker.ready]
        if not workers:
            raise ApiError(503, f"no worker of model {self.name} is ready", code="loading", retry_after=1)
        message["id"] = next(_ids)
        return min(workers, key=lambda worker: worker.choices).submit(message, stream, ready)

    def fail_all(self, error: ApiError) -> None:
        """Cancel all jobs with an error."""
        for worker in self.workers:
            for ticket in list(worker.tickets.values()):
                ticket.cancel()
                ticket.fail(error)

    async def close(self) -> None:
        """Stop the workers."""
        await asyncio.gather(*(worker.close() for worker in self.workers))
