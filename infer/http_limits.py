"""uvicorn's HTTP/1.1 protocol with limits per client: open connections, and time to send a request's headers.

uvicorn itself waits for headers without end (a slowloris attack needs no more), and counts connections only in total.
"""

import asyncio
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# A browser opens up to six to a host, per profile; a reverse proxy may put many clients behind one address.
MAX_CONNECTIONS_PER_CLIENT = 64
HEADER_TIMEOUT_S = 10.0


class LimitedProtocol(H11Protocol):
    """One connection. It is closed without an answer when it exceeds a limit."""

    _open: ClassVar[Counter[str]] = Counter()  # connections by client address, in all servers of this process

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and start to wait for its first request."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._open[self._address] += 1
        if self._open[self._address] > MAX_CONNECTIONS_PER_CLIENT:
            transport.abort()
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; each request's headers have HEADER_TIMEOUT_S from the first byte on."""
        self._await_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection as closed."""
        if self._header_timer:
            self._header_timer.cancel()
        self._open[self._address] -= 1
        if not self._open[self._address]:
            del self._open[self._address]
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)
