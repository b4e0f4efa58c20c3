"""The Gradio page of `infer ui`: built, guarded, and served, on loopback unless asked.

It loads nothing from other hosts and sends nothing to them.
"""

import contextlib
import importlib.util
import logging
import os
import socket
from pathlib import Path
from typing import Any

from charrnn.errors import ConfigError
from infer.addresses import listen
from infer.ui.models import Models

# Requests of all clients in the queue; one more is refused.
MAX_QUEUE = 16

_log = logging.getLogger(__name__)


def build_page(models: Models) -> Any:
    """Return the page over these models, a gradio.Blocks.

    Raises:
        ConfigError: Gradio is not installed.
        ModelFileError: The first model is damaged.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio, which is not installed: pip install 'charrnn[ui]'")
    import gradio

    from infer.ui.tabs import lay_out

    with gradio.Blocks(title="charrnn", analytics_enabled=False) as page:
        lay_out(page, models)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)
    return page


def build_app(page: Any, host: str) -> Any:
    """Return the page as a guarded ASGI application, for a server that is bound to `host`."""
    from fastapi import FastAPI
    from gradio import mount_gradio_app

    from infer.ui.guard import Guard
    from infer.ui.theme import head, theme

    app = mount_gradio_app(
        FastAPI(openapi_url=None), page, path="/", theme=theme(), head=head(), ssr_mode=False, show_error=False
    )
    return Guard(app, host, _input_types(page), lambda client: _waiting(page, client))


def _input_types(page: Any) -> dict[int, list[tuple[type, ...]]]:
    """Return the types of the arguments of each of the page's functions, by the function's number.

    Functions that run in the browser alone are left out.
    """
    kinds: dict[str, tuple[type, ...]] = {"slider": (int, float, str, type(None)), "state": (type(None),)}
    return {
        number: [kinds.get(part.get_block_name(), (str, type(None))) for part in function.inputs]
        for number, function in page.fns.items()
        if function.fn is not None
    }


def _waiting(page: Any, client: str) -> int:
    """Return how many of a client's requests wait in Gradio's queue."""
    queues = page._queue.event_queue_per_concurrency_id.values()
    return sum(event.request.client.host == client for queue in queues for event in queue.queue)


def build_server(page: Any, host: str) -> Any:
    """Return a uvicorn.Server of the page, to be run with sockets of `listen`."""
    import uvicorn

    from infer.http_limits import LimitedProtocol

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # The page's event streams stay open for as long as it is shown; closed, they end without an error.
            for connection in list(self.server_state.connections):
                connection.transport.close()
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            build_app(page, host),
            http=LimitedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )


def serve(model: str | os.PathLike[str] | None, folder: Path | None, host: str, port: int) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: The first model; None is the shipped one.
        folder: Its *.onnx files can be chosen as well; None is `checkpoints` in the current folder, if there is one.
        host: Address to bind.
        port: Port to bind.

    Raises:
        ConfigError: Gradio is missing, `folder` is not a folder, or the address cannot be bound.
        ModelFileError: The first model is missing or damaged.
    """
    page = build_page(Models(model, folder))
    with listen(host, port) as listener:
        url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
        _log.info("serving on %s (Ctrl-C stops it)", url)
        with contextlib.suppress(KeyboardInterrupt):
            build_server(page, host).run(sockets=[listener])
