"""`infer serve`: starts workers and the HTTP server, and ends them in order."""

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from charrnn.errors import ConfigError, ModelFileError
from infer.addresses import is_loopback, listen

log = logging.getLogger("charrnn.serve")


def named_models(models: Sequence[str]) -> dict[str, Path]:
    """The models' files by name.

    Args:
        models: FILE or NAME=FILE. A file's own name is its stem; that of a run's model.onnx is its folder's.

    Raises:
        ConfigError: if two have one name.
        ModelFileError: if a file is missing.
    """
    from infer.model_file.loader import default_model

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


def serve(
    models: Sequence[str],
    *,
    host: str,
    port: int,
    workers: int,
    threads: int,
    max_streams: int,
    max_queue: int,
    max_tokens_limit: int,
    timeout: float,
    drain_timeout: float,
    api_key: str | None,
    cors_origins: Sequence[str],
    log_json: bool,
) -> None:
    """Serve until SIGTERM or Ctrl-C; the arguments are those of the command line.

    Raises:
        ConfigError: if an extra is missing, or the address cannot be had.
        ModelFileError: if a model file is refused.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the server needs {package}, which is not installed: pip install 'charrnn[serve]'")
    from infer.server.app import Service
    from infer.server.logs import configure
    from infer.server.metrics import Metrics
    from infer.server.pool import Pool

    files = named_models(models)
    listener = listen(host, port)
    configure(log_json)
    api_key = api_key or os.environ.get("CHARRNN_API_KEY") or None
    if not is_loopback(host) and api_key is None:
        log.warning("serving on %s without an API key: whoever reaches it may use it; see --api-key", host)
    _raise_file_limit()
    if hasattr(signal, "SIGPIPE"):  # the command line lets it end the process, and any client that leaves would send it
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    metrics = Metrics()

    async def run() -> None:
        pools = {
            name: Pool(name, path, metrics, workers, threads, max_streams, max_queue) for name, path in files.items()
        }
        service = Service(
            pools, metrics, max_tokens_limit, timeout, api_key, tuple(cors_origins), loopback=is_loopback(host)
        )
        await _run(service, listener, drain_timeout)

    asyncio.run(run())


async def _run(service: Any, listener: socket.socket, drain_timeout: float) -> None:
    import uvicorn

    from infer.http_limits import TimedProtocol
    from infer.server.app import build_app
    from infer.server.errors import draining

    class Server(uvicorn.Server):
        """Signals are ours: uvicorn would end by the signal, not with 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    # How long after the end of --drain-timeout clients have to read what they were told.
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


async def _announce(service: Any, listener: socket.socket, server: Any) -> None:
    """Log once that all models are loaded; end the server when one cannot be."""
    for pool in service.pools.values():
        await pool.settled.wait()
        if pool.failure:
            server.should_exit = True
            return
    host, port = listener.getsockname()[:2]
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    log.info("serving %s on http://%s (Ctrl-C ends it)", ", ".join(service.pools), at)


def _raise_file_limit() -> None:
    """Let the process have as many connections as the system lets it ask for."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
