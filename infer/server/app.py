"""The ASGI application: routes, request size and time limits, error responses."""

import asyncio
from collections.abc import Awaitable
from html import escape
from pathlib import Path
from string import Template
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
from infer.server.pool import Pool
from infer.server.protocol import parse, parse_tokenize
from infer.server.ticket import Changes

MAX_BODY_BYTES = 2 << 20
# An oversized body is read and discarded up to this size, as clients read the response only after sending.
_MOST_DROPPED_BYTES = 64 << 20
BODY_TIMEOUT_S = 10.0
_PAGE = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # keeps nginx from buffering events
}


async def read_body(request: Request) -> bytes:
    """Return the body. Raises: ApiError if it is too large or does not arrive in time."""
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
    """Return the result of `work`; if the client disconnects first, cancel it and return None."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # after the body, the next message is the disconnect
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()


class EventStream(StreamingResponse):
    """A streamed completion; frees the request's rows however the response ends, even if it never starts."""

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
                # An error before the first text still gets its own status code.
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
        """GET /tokenizer_info: with the next two, all that lm-eval's local-completions needs of a tokenizer."""
        vocab = self._service.pool(None).vocab
        return JSONResponse({"bos_token": vocab.decode([vocab.start_id]), "eos_token": vocab.document_end})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize, vLLM's: {"prompt": TEXT} to {"tokens": [...], "count": N}."""
        asked = parse_tokenize(await read_body(request), "prompt", str)
        vocab = self._service.pool(asked.get("model")).vocab
        tokens = encoded(vocab, asked["prompt"], "error").tolist()
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize, vLLM's: {"tokens": [...]} to {"prompt": TEXT}."""
        asked = parse_tokenize(await read_body(request), "tokens", list)
        vocab = self._service.pool(asked.get("model")).vocab
        return JSONResponse({"prompt": vocab.decode(encoded(vocab, tuple(asked["tokens"]), "error").tolist())})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 if every model accepts requests, else 503."""
        if self._service.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "draining" if self._service.draining else "loading"}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text, kind = self._service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8"
        return Response(text, headers={"content-type": kind})

    async def page(self, request: Request) -> Response:
        """GET /: what this server is, and a curl command to try it with."""
        models = ", ".join(f"<code>{escape(name)}</code>" for name in self._service.pools)
        key = " -H 'Authorization: Bearer KEY'" if self._service.api_key is not None else ""
        html = _PAGE.substitute(models=models, url=escape(str(request.base_url)), key=key)
        return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _model(pool: Pool) -> dict[str, Any]:
    facts = pool.facts or {}
    own = {name: facts.get(name) for name in ("sha256", "shape", "precision")}
    return {"id": pool.name, "object": "model", "created": facts.get("created", 0), "owned_by": "charrnn"} | own


async def _answer_error(request: Request, error: Exception) -> Response:
    """Return the response to an error; a defect's traceback is logged by uvicorn."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # for the access log; the client is gone
    if isinstance(error, ApiError):
        return error_response(error)
    if isinstance(error, HTTPException):
        path = request.scope["path"][:200]
        response = error_response(ApiError(error.status_code, f"{request.method} {path}: {error.detail}"))
        response.headers.update(error.headers or {})  # Allow, with 405
        return response
    name = request.scope["request_id"]
    response = error_response(ApiError(500, f"internal server error; see request {name} in the server's log"))
    response.headers["x-request-id"] = name  # Starlette's error middleware is outside of Guard
    return response


def build_app(service: Service) -> Starlette:
    """Build the ASGI application."""
    routes = Routes(service)
    handlers: dict[Any, Any] = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), _answer_error)
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
