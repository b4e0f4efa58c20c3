"""uvicorn's HTTP/1.1 protocol with timeouts for stalled clients, and a limit of connections per client.

uvicorn itself waits indefinitely for headers (slowloris) and for clients to read, and limits connections only in total.
"""

import asyncio
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# A browser opens up to six to a host, per profile; a reverse proxy may put many clients behind one address.
MAX_CONNECTIONS_PER_CLIENT = 64
HEADER_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0


class TimedProtocol(H11Protocol):
    """A connection with timeouts for sending a request's headers and for reading a response."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request's headers."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called as soon as the kernel takes no more
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; each request's headers have HEADER_TIMEOUT_S from the first byte on."""
        self._await_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def pause_writing(self) -> None:
        """Start the timer for the client to read."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """Stop it: all was read."""
        super().resume_writing()
        if self._read_timer:
            self._read_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._header_timer, self._read_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _await_reading(self, unread_before: int | None = None) -> None:
        """Abort if nothing was read since the last call; check again after READ_TIMEOUT_S."""
        unread = self.transport.get_write_buffer_size()
        if unread_before is not None and unread >= unread_before:
            self.transport.abort()
        else:
            self._read_timer = self.loop.call_later(READ_TIMEOUT_S, self._await_reading, unread)


class LimitedProtocol(TimedProtocol):
    """Also limits connections per client to MAX_CONNECTIONS_PER_CLIENT; more are closed without a response."""

    _open: ClassVar[Counter[str]] = Counter()  # connections by client address, in all servers of this process

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._open[self._address] += 1
        if self._open[self._address] > MAX_CONNECTIONS_PER_CLIENT:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection as closed."""
        self._open[self._address] -= 1
        if not self._open[self._address]:
            del self._open[self._address]
        super().connection_lost(exc)
