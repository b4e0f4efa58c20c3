"""Middleware of every request: authentication, Host and Origin checks, request id, request count, access log."""

import hmac
import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from charrnn.errors import printable
from infer.addresses import hostname_of, is_loopback, netloc_of
from infer.server.errors import ApiError
from infer.server.metrics import Metrics
from infer.server.pool import Pool

log = logging.getLogger("charrnn.serve")

# Served without an API key, for orchestrators and scrapers.
_OPEN_PATHS = ("/", "/health", "/metrics")
_PATHS = (*_OPEN_PATHS, "/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/tokenizer_info")


@dataclass
class Service:
    """State shared by the routes.

    Attributes:
        pools: Worker pools by model name; the first is the default.
        max_tokens_limit: Upper limit of max_tokens.
        timeout: Request timeout in seconds.
        api_key: Key that requests must send; None = no authentication.
        origins: Allowed CORS origins; "*" is all.
        loopback: Whether the server is bound to a loopback address.
        draining: Whether it is shutting down.
    """

    pools: dict[str, Pool]
    metrics: Metrics
    max_tokens_limit: int
    timeout: float
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    loopback: bool = True
    draining: bool = False

    @property
    def ready(self) -> bool:
        """Whether every model accepts requests."""
        return not self.draining and all(pool.ready for pool in self.pools.values())

    def pool(self, name: str | None) -> Pool:
        """Return the worker pool of a model. Raises: ApiError 404."""
        if name is None:
            return next(iter(self.pools.values()))
        if name not in self.pools:
            known = ", ".join(self.pools)
            raise ApiError(404, f"there is no model {name[:200]!r}; there are: {known}", "model", "model_not_found")
        return self.pools[name]


class Guard:
    """ASGI middleware: checks Origin, Host and API key; counts and logs each request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # nginx's status for a client that disconnects before the response
        scope["request_id"] = f"cmpl-{uuid.uuid4().hex[:24]}"
        facts: dict[str, Any] = {}
        scope["facts"] = facts

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", scope["request_id"].encode()))
            await send(message)

        try:
            try:
                self._check(Request(scope))
            except ApiError as error:
                await error_response(error)(scope, receive, named)
                return
            await self._app(scope, receive, named)
        except Exception:  # Starlette's error middleware, outside of this one, sends the response
            status = 500 if status == 499 else status
            raise
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._service.metrics.requests.labels(path, status).inc()
            if not (path in ("/health", "/metrics") and status < 500):
                facts |= {"status": status, "seconds": round(time.perf_counter() - began, 4), "id": scope["request_id"]}
                log.info("%s %s", scope["method"], printable(scope["path"][:200]), extra={"facts": facts})

    def _check(self, request: Request) -> None:
        service = self._service
        # CSRF: pages of other sites must not use the server through a visitor's browser.
        origin, host = request.headers.get("origin"), request.headers.get("host")
        allowed = bool({"*", origin} & set(service.origins))
        if not allowed and origin is not None and netloc_of(origin) != host:
            raise ApiError(403, "the request comes from another site; see --cors-origin", code="origin")
        # DNS rebinding: a page that reaches a server on loopback by a host name of its own. It has no key.
        if not (allowed or service.api_key) and service.loopback and host is not None and not self._is_own(host):
            raise ApiError(421, f"this server is not {host[:200]!r}; see --cors-origin, --api-key", code="host")
        # Not request.url, which contains the client's Host header.
        if service.api_key is not None and request.scope["path"] not in _OPEN_PATHS:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), service.api_key.encode()):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server, which is bound to loopback."""
        return is_loopback(hostname_of(host)) or host in map(netloc_of, self._service.origins)


def error_response(error: ApiError) -> JSONResponse:
    """Return the error as a response."""
    return JSONResponse(error.body(), error.status, error.headers())
