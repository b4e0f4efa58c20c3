"""The HTTP side: routes, authorization, limits of what a request may be, errors in one shape."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infer.server.completions import Completion, encoded
from infer.server.errors import ApiError, draining
from infer.server.guard import Guard, Service, error_response
from infer.server.page import page
from infer.server.pool import Pool
from infer.server.protocol import parse, parse_tokenize
from infer.server.ticket import Changes

log = logging.getLogger("charrnn.serve")

MAX_BODY_BYTES = 2 << 20
# What is too large is read on and dropped, up to this, so that the client comes to reading the answer.
_MOST_DROPPED_BYTES = 64 << 20
BODY_TIMEOUT_S = 10.0
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the events back
}


async def read_body(request: Request) -> bytes:
    """The body. Raises: ApiError when it is too large, or takes too long to arrive."""
    body, size = b"", 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BODY_BYTES:
                    body += chunk
                if size > _MOST_DROPPED_BYTES:
                    break
    except TimeoutError:
        raise ApiError(400, f"the body did not arrive in {BODY_TIMEOUT_S:g} s", code="slow_body") from None
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes; shorten the prompt", code="too_large")
    return body


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` returns; it is cancelled, and None returned, when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the disconnection
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()


class EventStream(StreamingResponse):
    """A completion as it comes; however the response ends, or does not begin, the rows of its request are free then."""

    def __init__(self, completion: Completion, changes: Any, first: Changes, facts: dict[str, Any]) -> None:
        super().__init__(completion.stream(changes, first), headers=_STREAM_HEADERS)
        self._completion, self._facts = completion, facts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()
            self._facts["chars"] = self._completion.chars


class Routes:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        began = asyncio.get_running_loop().time()
        asked = parse(await read_body(request), self._service.max_tokens_limit)
        if self._service.draining:
            raise draining()
        pool = self._service.pool(asked.model)
        completion = Completion(asked, pool, request.scope["request_id"], self._service.timeout, began)
        facts = request.scope["facts"]
        facts |= {"model": pool.name, "prompt_chars": completion.prompt_chars}
        try:
            completion.submit()
            if asked.stream:
                changes = completion.changes()
                # Errors that come before any text still get a status of their own.
                first = await unless_gone(request, anext(changes, {}))
                if first is not None:
                    return EventStream(completion, changes, first, facts)
            else:
                body = await unless_gone(request, completion.complete())
                if body is not None:
                    facts["chars"] = completion.chars
                    return JSONResponse(body)
        except BaseException:
            completion.cancel()
            raise
        completion.cancel()
        return Response(status_code=499)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [_model(pool) for pool in self._service.pools.values()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(_model(self._service.pool(request.path_params["name"])))

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info, which with the next two lets lm-eval's local-completions do without a tokenizer."""
        vocab = self._service.pool(None).vocab
        return JSONResponse({"bos_token": vocab.decode([vocab.start_id]), "eos_token": vocab.document_end})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize, as vLLM has it: {"prompt": TEXT} to {"tokens": [...], "count": N}."""
        asked = parse_tokenize(await read_body(request), "prompt", str)
        vocab = self._service.pool(asked.get("model")).vocab
        tokens = encoded(vocab, asked["prompt"], "error").tolist()
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize, as vLLM has it: {"tokens": [...]} to {"prompt": TEXT}."""
        asked = parse_tokenize(await read_body(request), "tokens", list)
        vocab = self._service.pool(asked.get("model")).vocab
        return JSONResponse({"prompt": vocab.decode(encoded(vocab, tuple(asked["tokens"]), "error").tolist())})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when every model takes requests, else 503."""
        if self._service.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "draining" if self._service.draining else "loading"}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text, kind = self._service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8"
        return Response(text, headers={"content-type": kind})

    async def page(self, request: Request) -> Response:
        """GET /: what this is, and how to use it."""
        html = page(list(self._service.pools), str(request.base_url), self._service.api_key is not None)
        return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _model(pool: Pool) -> dict[str, Any]:
    facts = pool.facts or {}
    own = {name: facts.get(name) for name in ("sha256", "shape", "precision")}
    return {"id": pool.name, "object": "model", "created": facts.get("created", 0), "owned_by": "charrnn"} | own


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    return error_response(ApiError(error.status_code, f"{request.method} {path}: {error.detail}"))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log does


async def _defect(request: Request, error: Exception) -> Response:
    name = request.scope["request_id"]
    response = error_response(ApiError(500, f"an error of the server; its log has request {name}"))
    response.headers["x-request-id"] = name  # Starlette answers outside of Guard, which sets it else
    return response


def build_app(service: Service) -> Starlette:
    """The ASGI application."""
    routes = Routes(service)
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _defect,
    }  # fmt: skip
    middleware = [Middleware(Guard, service=service)]
    if service.origins:
        cors = Middleware(CORSMiddleware, allow_origins=service.origins, allow_methods=["GET", "POST"],
                          allow_headers=["*"], expose_headers=["x-request-id", "retry-after"])  # fmt: skip
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers=handlers,
    )
