"""What stands between the network and Gradio: of its many routes the page's own, asked for by the page's own readers.

Gradio takes uploads, fetches what a request names, and answers whoever asks. A request comes through only if it is for
a route that the page uses, is small, is addressed to this server, and does not come from another site's page.
"""

import asyncio
import ipaddress
import json
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

# A text that the page refuses for its length arrives all the same, up to this, and is refused in words.
MOST_BODY_BYTES = 1 << 20
# A page keeps two open, and opens some more while it loads.
MOST_OPEN_PER_CLIENT = 64
BODY_TIMEOUT_S = 10.0

# What the page asks for: of Gradio 6.20 to 6.31, as tests/test_page.py finds it.
_READ = re.compile(
    r"/|/(assets|static)/[\w./%@+-]+|/(theme\.css|favicon\.ico|manifest\.json|robots\.txt)"
    r"|/gradio_api/(startup-events|app_id|queue/data|heartbeat/\w{1,64})"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|run/predict|cancel|reset)")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class _RefusedError(Exception):
    """A request that goes no further. status: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """ASGI middleware.

    host: the address that the server is bound to. inputs: what each of the page's functions takes, by the function's
    number: for each value, the types that it may have.
    """

    def __init__(self, app: App, host: str, inputs: dict[int, list[tuple[type, ...]]]) -> None:
        self._app, self._host, self._inputs = app, host.strip("[]").lower(), inputs
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket, of which the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        client = (scope.get("client") or ("",))[0]
        self._open[client] += 1
        try:
            if self._open[client] > MOST_OPEN_PER_CLIENT:
                raise _RefusedError(429, f"more than {MOST_OPEN_PER_CLIENT} requests at once")
            self._check_addresses(scope)
            body = await self._body(scope, receive)
        except _RefusedError as refusal:
            await _answer(send, refusal)
            return
        else:
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def _check_addresses(self, scope: Message) -> None:
        """Refuses what is for no route of ours, for another host, or from another site."""
        routes = {"GET": _READ, "HEAD": _READ, "POST": _WRITE}.get(scope["method"])
        if routes is None or not routes.fullmatch(scope["path"]) or ".." in scope["path"]:
            raise _RefusedError(404, "there is nothing here")
        hosts = _headers(scope, b"host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            raise _RefusedError(421, "this server has another name")
        # A page of another site may neither send to this one nor, by a name that it points here, read from it.
        if any(urlsplit(origin).netloc != hosts[0] for origin in _headers(scope, b"origin")):
            raise _RefusedError(403, "the request comes from another site")

    def _is_own(self, netloc: str) -> bool:
        """Whether a request for this host and port can be meant for this server: names that others own cannot."""
        try:
            name = urlsplit(f"//{netloc}").hostname or ""
        except ValueError:
            return False
        if "@" in netloc:
            return False
        if name in (self._host, "localhost"):
            return True
        loopback = self._host == "localhost" or _is_loopback(self._host)
        try:
            return ipaddress.ip_address(name).is_loopback or not loopback
        except ValueError:
            return not loopback and name == socket.gethostname().lower()

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body of a request, of plain values alone: in others Gradio finds files, and fetches them."""
        if scope["method"] != "POST":
            return b""
        if any(not size.isdecimal() or int(size[:20]) > MOST_BODY_BYTES for size in _headers(scope, b"content-length")):
            raise _RefusedError(413, f"more than {MOST_BODY_BYTES} bytes")
        try:
            body = await asyncio.wait_for(_received(receive), BODY_TIMEOUT_S)
        except TimeoutError:
            raise _RefusedError(408, f"the request took more than {BODY_TIMEOUT_S:g} s") from None
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            raise _RefusedError(400, "the request is not JSON") from None
        ends_a_call = scope["path"].endswith(("cancel", "reset"))
        if not isinstance(fields, dict) or not (_is_end(fields) if ends_a_call else self._is_call(fields)):
            raise _RefusedError(400, "the request has values that the page does not send")
        return body

    def _is_call(self, fields: dict[str, Any]) -> bool:
        """Whether it is a call of one of the page's functions with values that it may have."""
        number, data = fields.get("fn_index"), fields.get("data")
        expected = self._inputs.get(number) if type(number) is int else None
        if expected is None or not isinstance(data, list) or len(data) != len(expected):
            return False
        return all(isinstance(value, types) for value, types in zip(data, expected, strict=True))


def _is_end(fields: dict[str, Any]) -> bool:
    """Whether it names a call to end, by plain values alone."""
    known = fields.keys() <= {"event_id", "session_hash", "fn_index"}
    return known and all(type(v) is int or (isinstance(v, str) and v.isprintable()) for v in fields.values())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _headers(scope: Message, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _received(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _RefusedError(400, "the request ended early")
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
            raise _RefusedError(413, f"more than {MOST_BODY_BYTES} bytes")
        if not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body which was read already, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, refusal: _RefusedError) -> None:
    text = str(refusal).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    # What is left of a body that was not read must not be taken for the next request.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
