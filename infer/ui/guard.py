"""ASGI middleware in front of Gradio: lets through only the requests that the page itself makes.

Gradio accepts uploads, fetches URLs that a request names, and answers any Host and Origin. A request passes if the page
uses its route, its body is small and of plain values, and neither its Host nor its Origin is foreign.
"""

import asyncio
import ipaddress
import json
import re
import socket
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.addresses import hostname_of, is_loopback, netloc_of

# Room for a text that predictions.py refuses for its length, with a message.
MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 10.0
MAX_WAITING_PER_CLIENT = 8

# The routes of Gradio 6.20 to 6.31 that the page uses, as tests/test_page.py finds them.
_READ = re.compile(
    r"/|/(assets|static)/[\w./%@+-]+|/(theme\.css|favicon\.ico|manifest\.json|robots\.txt)"
    r"|/gradio_api/(app_id|queue/data|heartbeat/\w{1,64})"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|run/predict|cancel|reset)")


class _RefusedError(Exception):
    """A request that goes no further, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """The middleware.

    Args:
        app: The application behind it.
        host: The address that the server is bound to.
        inputs: The types that each argument of each of the page's functions may have, by the function's number.
        waiting: Returns how many requests of a client, by its address, wait in the queue.
    """

    def __init__(
        self, app: ASGIApp, host: str, inputs: dict[int, list[tuple[type, ...]]], waiting: Callable[[str], int]
    ) -> None:
        self._app, self._host, self._inputs, self._waiting = app, host.lower(), inputs, waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            try:
                self._check_address(scope)
                receive = _replay(await self._body(scope, receive), receive)
            except _RefusedError as refusal:
                # The rest of an unread body must not be taken for the next request.
                answer = PlainTextResponse(str(refusal), refusal.status, {"connection": "close"})
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_address(self, scope: Scope) -> None:
        """Refuse an unknown route, a foreign Host, a foreign Origin."""
        routes = {"GET": _READ, "HEAD": _READ, "POST": _WRITE}.get(scope["method"])
        if routes is None or not routes.fullmatch(scope["path"]) or ".." in scope["path"]:
            raise _RefusedError(404, "not found")
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            raise _RefusedError(421, "this server does not answer to that host name")
        # Against cross-site requests, and DNS rebinding.
        if any(netloc_of(origin) != hosts[0] for origin in headers.getlist("origin")):
            raise _RefusedError(403, "cross-origin request")

    def _is_own(self, netloc: str) -> bool:
        """Return whether a Host header can mean this server; names that others may own cannot."""
        name = hostname_of(netloc)
        if name in (self._host, "localhost"):
            return True
        local_only = is_loopback(self._host)
        try:
            return ipaddress.ip_address(name).is_loopback or not local_only
        except ValueError:
            return not local_only and name == socket.gethostname().lower()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body of a request, of plain values alone: Gradio would fetch the files that others name."""
        if scope["method"] != "POST":
            return b""
        too_large = _RefusedError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        sizes = Headers(scope=scope).getlist("content-length")
        if any(not size.isdecimal() or int(size[:20]) > MAX_BODY_BYTES for size in sizes):
            raise too_large
        body = b""
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in Request(scope, receive).stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large
        except TimeoutError:
            raise _RefusedError(408, f"the body took more than {BODY_TIMEOUT_S:g} s") from None
        except ClientDisconnect:
            raise _RefusedError(400, "the request ended early") from None
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            raise _RefusedError(400, "the body is not JSON") from None
        ends_call = scope["path"].endswith(("cancel", "reset"))
        if not isinstance(fields, dict) or not (_is_end(fields) if ends_call else self._is_call(fields)):
            raise _RefusedError(400, "the body has values that the page does not send")
        client = (scope.get("client") or ("",))[0]
        if scope["path"].endswith("queue/join") and self._waiting(client) >= MAX_WAITING_PER_CLIENT:
            raise _RefusedError(429, f"{MAX_WAITING_PER_CLIENT} requests of this client are waiting already")
        return body

    def _is_call(self, fields: dict[str, Any]) -> bool:
        """Return whether it calls one of the page's functions with arguments of the right types."""
        number, data = fields.get("fn_index"), fields.get("data")
        expected = self._inputs.get(number) if type(number) is int else None
        if expected is None or not isinstance(data, list) or len(data) != len(expected):
            return False
        return all(isinstance(value, types) for value, types in zip(data, expected, strict=True))


def _is_end(fields: dict[str, Any]) -> bool:
    """Return whether it names a call to end, by plain values alone."""
    known = fields.keys() <= {"event_id", "session_hash", "fn_index"}
    return known and all(type(v) is int or (isinstance(v, str) and v.isprintable()) for v in fields.values())


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body which was read already, and then what comes after it."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay
