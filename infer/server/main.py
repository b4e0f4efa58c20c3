"""Start workers and the HTTP server, and end them in order."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from charrnn.errors import ConfigError, ModelFileError
from infer.http_limits import TimedProtocol
from infer.model_file.loader import default_model
from infer.server.app import build_app
from infer.server.errors import draining
from infer.server.guard import Service

log = logging.getLogger("charrnn.serve")


def named_models(models: Sequence[str]) -> dict[str, Path]:
    """Return the model files by name.

    Args:
        models: FILE or NAME=FILE. The default name is the file's stem, or the folder's name for model.onnx.

    Raises:
        ConfigError: if two have one name.
        ModelFileError: if a file is missing.
    """
    found: dict[str, Path] = {}
    for model in models or [str(default_model())]:
        name, equals, file = model.partition("=")
        path = Path(file if equals and not os.path.exists(model) else model)  # noqa: PTH110  # takes any name
        if path == Path(model):
            name = path.resolve().parent.name if path.stem == "model" else path.stem
        if not os.path.isfile(path):  # noqa: PTH113
            raise ModelFileError(f"{path} does not exist or is not a file; name a model file (.onnx)")
        if not name or name in found:
            raise ConfigError(f"two models are called {name!r}; give names: --model NAME=FILE")
        found[name] = path
    return found


class Server(uvicorn.Server):
    """Leaves signals to `run`: uvicorn would exit by the signal, not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


async def run(service: Service, listener: socket.socket, drain_timeout: float) -> None:
    """Serve until SIGTERM or Ctrl-C, and then for at most `drain_timeout` seconds.

    Raises:
        ModelFileError: if a model file is refused.
    """
    _raise_file_limit()
    if hasattr(signal, "SIGPIPE"):  # the command line resets it, but here every client that disconnects causes one
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # 3 s after --drain-timeout for clients to read the last responses.
    config = uvicorn.Config(build_app(service), http=TimedProtocol, log_config=None, access_log=False, lifespan="off",
                            ws="none", timeout_graceful_shutdown=int(drain_timeout) + 3, backlog=2048,
                            server_header=False)  # fmt: skip
    server = Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if service.draining:
            server.force_exit = True
            return
        log.info("stopping: requests have %g s to finish", drain_timeout)
        service.draining = server.should_exit = True
        for pool in service.pools.values():
            loop.call_later(drain_timeout, pool.fail_all, draining())

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    keepers = [asyncio.create_task(worker.run()) for pool in service.pools.values() for worker in pool.workers]
    tasks = [*keepers, asyncio.create_task(_announce(service, listener, server))]
    try:
        await server.serve(sockets=[listener])
    finally:
        for pool in service.pools.values():
            await pool.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for pool in service.pools.values():
        if pool.failure:
            raise ModelFileError(pool.failure)


async def _announce(service: Service, listener: socket.socket, server: Server) -> None:
    """Log the address once all models are loaded; stop the server if one is refused."""
    for pool in service.pools.values():
        await pool.startup_finished.wait()
        if pool.failure:
            server.should_exit = True
            return
    host, port = listener.getsockname()[:2]
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    log.info("serving %s on http://%s (Ctrl-C ends it)", ", ".join(service.pools), at)


def _raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
