"""A submitted job, as seen by the request that waits for it."""

import asyncio
from collections.abc import Callable
from typing import Any

from infer.server.errors import ApiError

# Bound of text buffered for a client that does not read: minutes of one stream.
_MOST_UNREAD_CHARS = 1 << 18
# Memory of a character with log probabilities, in characters without.
_SCORED_CHARS = 64
# New output of each choice by its index: `text`, `chars`, and optionally `scores`, `finish` and `state`.
Changes = dict[int, dict[str, Any]]


def size_of(message: dict[str, Any]) -> int:
    """Return the bytes of a job's prompt and state."""
    return len(message["ids"]) + len(message["state"] or "")


class Ticket:
    """A submitted job, as seen by the request that waits for it.

    Args:
        cancel: Cancels the job at its worker.
        message: The job as sent to the worker.
        stream: Whether to wake the reader for partial output.
        ready: Event set when there is output to take; shared by the jobs of a request.
        metrics: Metrics of the model.
    """

    def __init__(
        self,
        cancel: Callable[["Ticket"], None],
        message: dict[str, Any],
        stream: bool,
        ready: asyncio.Event,
        metrics: Any,
    ) -> None:
        self.id, self.choices, self.bytes = message["id"], len(message["seeds"]) or 1, size_of(message)
        self._cancel, self._stream, self._ready, self._metrics = cancel, stream, ready, metrics
        self._unfinished, self._unread = self.choices, 0
        self._changes: Changes = {}
        self._began = asyncio.get_running_loop().time()
        self._timings: dict[int, list[float]] = {}  # by choice: time of its first text, characters since
        self.error: ApiError | None = None

    @property
    def finished(self) -> bool:
        """Whether there will be no more output."""
        return not self._unfinished or self.error is not None

    @property
    def done(self) -> bool:
        """Whether all output has been taken; never true for a failed job, as `take` has to raise its error."""
        return self.error is None and not self._unfinished and not self._changes

    def push(self, event: dict[str, Any]) -> None:
        """Add an event. The first and the last wake the reader at once, the others when `wake` is called."""
        first = not self._timings
        if "prompt_scores" in event:
            for i in range(self.choices):
                self._change(i).setdefault("scores", []).extend(event["prompt_scores"])
        else:
            self._observe(event["i"], event["chars"], "finish" in event)
            change = self._change(event["i"])
            change["text"] += event["text"]
            change["chars"] += event["chars"]
            if "scores" in event:
                change.setdefault("scores", []).extend(event["scores"])
            change |= {name: event[name] for name in ("finish", "state") if name in event}
            self._unread += len(event["text"]) + _SCORED_CHARS * len(event.get("scores", ()))
            self._unfinished -= "finish" in event
        if self._stream and self._unread > _MOST_UNREAD_CHARS:
            self.cancel()
            self.fail(ApiError(503, "the text was not read fast enough", code="slow_reader"))
        elif self.finished or (self._stream and first):
            self._ready.set()

    def _change(self, index: int) -> dict[str, Any]:
        return self._changes.setdefault(index, {"text": "", "chars": 0})

    def _observe(self, index: int, chars: int, ends: bool) -> None:
        """Record time to first text, and at the end of the choice time per character after it."""
        now = asyncio.get_running_loop().time()
        if index in self._timings:
            self._timings[index][1] += chars
        elif chars:
            self._timings[index] = [now, 0]
            self._metrics.first.observe(now - self._began)
        first_at, since = self._timings.get(index, (now, 0))
        if ends and since:
            self._metrics.per_char.observe((now - first_at) / since)

    def wake(self) -> None:
        """Wake the reader of a stream."""
        if self._stream:
            self._ready.set()

    def fail(self, error: ApiError) -> None:
        """End the job with an error; output not taken yet is discarded."""
        self.error, self._changes = error, {}
        self._ready.set()

    def take(self) -> Changes:
        """Return the output since the last call. Raises: ApiError if the job failed."""
        if self.error:
            raise self.error
        changes, self._changes, self._unread = self._changes, {}, 0
        return changes

    def cancel(self) -> None:
        """Free the job's rows, unless it is over."""
        self._cancel(self)
