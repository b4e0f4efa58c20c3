"""A job at a worker, as the request that waits for it sees it."""

import asyncio
from collections.abc import Callable
from typing import Any

from infer.server.errors import ApiError

# Of what waits for a client that does not read: 256 Ki characters are minutes of one stream.
_MOST_UNREAD_CHARS = 1 << 18
# A character with its log probabilities takes the memory of so many without.
_SCORED_CHARS = 64


def size_of(message: dict[str, Any]) -> int:
    """Bytes of a job's prompt and state."""
    return len(message["ids"]) + len(message["state"] or "")


class Ticket:
    """A job at a worker, as the request that waits for it sees it.

    Args:
        cancel: Takes the job back from its worker.
        message: What the worker was given.
        choices: Texts that the job generates.
        stream: Whether text is wanted as it comes; else all at the end.
        ready: Is set when there is something to take; the jobs of a request share one.
    """

    def __init__(
        self,
        cancel: Callable[["Ticket"], None],
        message: dict[str, Any],
        choices: int,
        stream: bool,
        ready: asyncio.Event,
    ) -> None:
        self.id, self.choices, self.bytes = message["id"], choices, size_of(message)
        self._cancel, self._stream, self._ready = cancel, stream, ready
        self._unfinished, self._unread, self._first = choices, 0, True
        self._events: list[dict[str, Any]] = []
        self._error: ApiError | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return not self._unfinished or self._error is not None

    @property
    def done(self) -> bool:
        """Whether the job has succeeded, and all has been taken; one that failed never is, as `take` has to raise."""
        return self._error is None and not self._unfinished and not self._events

    def push(self, event: dict[str, Any]) -> None:
        """Take an event. What comes first and last wakes the reader at once, the rest when `wake` is called."""
        self._events.append(event)
        self._unread += len(event.get("text", "")) + _SCORED_CHARS * len(event.get("scores", ()))
        self._unfinished -= "finish" in event
        if self._stream and self._unread > _MOST_UNREAD_CHARS:
            self.cancel()
            self.fail(ApiError(503, "the text was not read fast enough", code="slow_reader"))
        elif self.finished or (self._stream and self._first):
            self._first = False
            self._ready.set()

    def wake(self) -> None:
        """Wake the reader of a stream."""
        if self._stream:
            self._ready.set()

    def fail(self, error: ApiError) -> None:
        """End the job with an error, in place of what was not taken yet."""
        self._error, self._events = error, []
        self._ready.set()

    def take(self) -> list[dict[str, Any]]:
        """What has come since the last call. Raises: ApiError when the job has failed."""
        if self._error:
            raise self._error
        events, self._events, self._unread = self._events, [], 0
        return events

    def cancel(self) -> None:
        """Free the job's rows, unless it is over."""
        self._cancel(self)
