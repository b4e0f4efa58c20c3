"""Continuous batching at character granularity: rows join and leave a batch between two runs of the graph's loop.

After "cellular batching", Gao et al., "Low Latency RNN Inference with Cellular Batching", EuroSys 2018,
doi:10.1145/3190508.3190541. Letters: B batch rows, T characters read, V vocabulary size.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any

import numpy as np

from charrnn.errors import CharRNNError
from infer.engine import Engine
from infer.server.batch import GROUP_ROWS, Job, Row, run_rows, scored
from infer.server.states import BLOCK, PrefixCache, digests

# Target seconds of a tick while a choice waits for its first character, and otherwise; see docs/serving.md.
_SHORT_S, _LONG_S = 0.005, 0.03
# Limits of a tick's characters: below the minima, the overhead per run of the graph dominates.
_LEAST_SHORT, _LEAST_LONG, _MOST_CHARS = 4, 16, 128
# Seconds of prefill between two ticks, and the most logits of one call (prefill, or log probabilities): 8 MiB.
_READ_S, _MOST_LOGITS = 0.01, 1 << 21


class Scheduler:
    """Runs jobs and reports events, on the thread that calls `run`.

    Args:
        engine: The model.
        inbox: Queue of jobs, ids of jobs to cancel, and None to stop.
        send: Called with events and the counts since the last call; must not block.
        max_streams: Maximum number of rows; more choices wait.

    Every event has the job's `id`. A choice's events have `i` (its index), `text`, `chars` (in ids), and optionally
    `scores`, `finish` and `state`; a job's own have `prompt_scores` or, as the last one, `error`.
    """

    def __init__(
        self,
        engine: Engine,
        inbox: "SimpleQueue[Job | int | None]",
        send: Callable[[list[dict[str, Any]], dict[str, Any]], None],
        max_streams: int,
    ) -> None:
        self._engine, self._inbox, self._send, self._max_streams = engine, inbox, send, max_streams
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._ready: deque[Job] = deque()
        # By whether they have a repetition penalty: such rows are sampled in numpy and would slow down the others.
        # Round robin: the next group is taken from the left, rows that have run are appended.
        self._rows: dict[bool, deque[Row]] = {False: deque(), True: deque()}
        self._char_s = {False: (0.0, 1), True: (0.0, 1)}  # seconds per step of the last group, and its size
        self._read_char_s = 1e-5  # seconds per character of prefill; an initial guess
        self._cache = PrefixCache()
        self._events: list[dict[str, Any]] = []
        self._groups: list[int] = []  # rows of each tick since the last report
        self._urgent = False  # whether to report before all rows had their turn
        self._counts = {"read": 0, "generated": 0}

    @property
    def running(self) -> int:
        """Number of rows that generate."""
        return sum(map(len, self._rows.values()))

    @property
    def waiting(self) -> int:
        """Number of choices that do not generate yet."""
        return sum(len(job.streams) - job.started for job in (*self._waiting, *self._reading, *self._ready))

    def run(self) -> None:
        """Run until None arrives."""
        while self._receive():
            self._start_reading()
            self._read()
            self._admit()
            for penalised in self._rows:
                self._tick(penalised)
            # Every message wakes the server: one per turn of all rows, unless a client waits for it.
            if self._urgent or sum(self._groups) >= self.running:
                self._report()

    def _receive(self) -> bool:
        """Empty the inbox, waiting for an item if there are no jobs; return False to stop."""
        running, block, cancelled = True, not self._jobs, list[Job]()
        with contextlib.suppress(Empty):
            while running:
                item = self._inbox.get(block)
                block, running = False, item is not None
                if isinstance(item, Job):
                    self._jobs[item.id] = item
                    self._waiting.append(item)
                elif item in self._jobs:
                    cancelled.append(self._jobs[item])
        self._remove(cancelled)
        return running

    def _remove(self, jobs: list[Job]) -> None:
        """Remove jobs in any stage."""
        if not jobs:
            return
        for job in jobs:
            self._jobs.pop(job.id, None)
            job.cancelled = True
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._ready = deque(job for job in self._ready if not job.cancelled)
        self._reading = [job for job in self._reading if not job.cancelled]
        self._rows = {kind: deque(row for row in rows if not row.job.cancelled) for kind, rows in self._rows.items()}

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        message = str(error) if isinstance(error, CharRNNError) else f"out of memory: {error}"
        self._events += [{"id": job.id, "error": message} for job in jobs]
        self._urgent = True
        self._remove(jobs)

    def _start_reading(self) -> None:
        """Start prefill of as many waiting jobs as there will be free rows for."""
        taken = self.running + sum(len(job.streams) - job.started for job in (*self._reading, *self._ready))
        while self._waiting and taken < self._max_streams:
            job = self._waiting.popleft()
            taken += len(job.streams)
            job.blocks = digests(job.ids[:-1])
            if not (job.score_prompt or job.continued):
                job.position, state = self._cache.longest(job.blocks)
                job.state = state or job.state
            if job.score_prompt and not job.lead:
                job.prompt_scores.append((int(job.ids[0]), None, None))
            self._reading.append(job)

    def _read(self) -> None:
        """Prefill for about _READ_S: up to GROUP_ROWS prompts in a call, as far as the shortest."""
        end = perf_counter() + _READ_S
        self._finish_reading()
        while self._reading:
            try:
                self._read_together(jobs := self._reading[:GROUP_ROWS])
            except (CharRNNError, MemoryError) as error:
                self._fail(jobs, error)
            self._finish_reading()
            if perf_counter() > end:
                return

    def _finish_reading(self) -> None:
        """Move jobs whose prompt is read to the queue for rows."""
        for job in [job for job in self._reading if job.position == len(job.ids) - 1]:
            self._reading.remove(job)
            self._ready.append(job)
            if job.score_prompt:
                self._events.append({"id": job.id, "prompt_scores": job.prompt_scores})
                self._urgent = True

    def _read_together(self, jobs: list[Job]) -> None:
        lengths = [min(BLOCK - job.position % BLOCK, len(job.ids) - 1 - job.position) for job in jobs]
        in_time = max(_LEAST_SHORT, int(_READ_S / self._read_char_s / len(jobs)))
        length = min(*lengths, in_time, max(1, _MOST_LOGITS // (len(jobs) * len(self._engine.vocab))))
        ids = np.stack([job.ids[job.position : job.position + length] for job in jobs])  # (B, T)
        state = tuple(np.concatenate(parts, axis=1) for parts in zip(*(job.state for job in jobs), strict=True))
        began = perf_counter()
        logits, state = self._engine.step(ids, state)  # (B, T, V), each (L, B, H)
        self._read_char_s = (perf_counter() - began) / ids.size
        self._counts["read"] += ids.size
        for b, job in enumerate(jobs):
            if job.score_prompt:
                nexts = job.ids[job.position + 1 : job.position + 1 + length].tolist()
                job.prompt_scores += scored(logits[b], nexts, job.logprobs or 0)
            job.position += length
            job.state = tuple(part[:, b : b + 1].copy() for part in state)
            if not job.continued and job.position % BLOCK == 0:
                self._cache.put(job.blocks[job.position // BLOCK - 1], job.state)

    def _admit(self) -> None:
        """Give free rows to choices whose prompt is read, in order of arrival; they run next.

        At most half a group per tick, so that a burst of new rows does not starve the others.
        """
        new: list[Row] = []
        free = min(self._max_streams - self.running, GROUP_ROWS // 2)
        while self._ready and len(new) < free:
            job = self._ready[0]
            row = Row(job, job.started, self._engine)
            job.started += 1
            if job.started == len(job.streams):
                self._ready.popleft()
            if job.length:
                new.append(row)
            elif event := row.feed([row.last]):
                self._deliver([event])
        for row in reversed(new):
            self._rows[row.penalised].appendleft(row)

    def _tick(self, penalised: bool) -> None:
        """Generate some characters for the next group of rows."""
        queue = self._rows[penalised]
        rows = [queue.popleft() for _ in range(min(GROUP_ROWS, len(queue)))]
        if not rows:
            return
        length = self._length(rows, *self._char_s[penalised])
        self._urgent |= any(row.fresh for row in rows)
        began = perf_counter()
        try:
            events = run_rows(self._engine, rows, length)
        except (CharRNNError, MemoryError) as error:
            self._fail(list({row.job.id: row.job for row in rows}.values()), error)
            return
        self._char_s[penalised] = (perf_counter() - began) / length, len(rows)
        queue.extend(row for row in rows if not row.ended)
        self._groups.append(len(rows))
        self._deliver(events)

    def _length(self, rows: list[Row], char_s: float, rows_before: int) -> int:
        """Return the characters of the next tick, estimated from the target time."""
        waiting = self._reading or self._ready or any(row.fresh for row in rows)
        char_s *= max(1.0, len(rows) / rows_before)
        seconds, least = (_SHORT_S, _LEAST_SHORT) if waiting else (_LONG_S, _LEAST_LONG)
        length = int(seconds / char_s) if char_s else least
        return min(max(length, least), _MOST_CHARS, self._most_scored(rows), max(row.left for row in rows))

    def _most_scored(self, rows: list[Row]) -> int:
        """Return the most characters of a tick, limited by the logits of rows that report log probabilities."""
        scored_rows = sum(row.job.logprobs is not None for row in rows)
        return max(1, _MOST_LOGITS // (scored_rows * len(self._engine.vocab))) if scored_rows else _MOST_CHARS

    def _deliver(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._counts["generated"] += event["chars"]
            if "finish" in event:
                self._urgent = True
                job = self._jobs[event["id"]]
                job.finished += 1
                if job.finished == len(job.streams):
                    del self._jobs[job.id]
        self._events += events

    def _report(self) -> None:
        counts = self._counts | {"running": self.running, "waiting": self.waiting, "groups": self._groups}
        counts |= {"hits": self._cache.hits, "misses": self._cache.misses}
        self._send(self._events, counts)
        self._events, self._groups, self._counts = [], [], {"read": 0, "generated": 0}
        self._urgent = False
        self._cache.hits = self._cache.misses = 0
