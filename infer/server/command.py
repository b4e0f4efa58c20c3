"""The `infer serve` command; what serves is imported when it runs."""

import os
from typing import Annotated, Literal

import typer

from charrnn.errors import ConfigError


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="[NAME=]FILE",
            help="Model file; repeat for several, chosen by name in requests.  [default: the shipped model]",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 serves other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind; 0 picks a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes per model, each with its own copy.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="CPU threads per worker.")] = 1,
    max_streams: Annotated[
        int, typer.Option(min=1, max=65536, help="Concurrent streams per worker; more are queued.")
    ] = 512,
    max_queue: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Queued choices per model; more are answered with 429.")
    ] = 512,
    max_tokens_limit: Annotated[
        int, typer.Option(min=1, max=1_000_000_000, help="Upper limit of max_tokens.")
    ] = 100_000,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request fails.")] = 600,
    drain_timeout: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds for running requests to finish after SIGTERM or Ctrl-C.")
    ] = 10,
    api_key: Annotated[
        str | None, typer.Option(help="API key that requests must carry; better in CHARRNN_API_KEY.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Allowed CORS origin; repeat for several; * is all.")
    ] = None,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Form of log lines on standard error.")] = "text",
) -> None:
    """Serve models over an OpenAI-compatible API (needs: pip install 'charrnn[serve]').

    POST /v1/completions, GET /v1/models, /health, /metrics. Requests run in one batch, which they join and leave at
    every character. Ctrl-C or SIGTERM lets those that run finish.
    """
    import asyncio  # takes half as long as all of `infer --help`
    import importlib.util

    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the server needs {package}, which is not installed: pip install 'charrnn[serve]'")
    from infer.addresses import is_loopback, listen
    from infer.server import main
    from infer.server.guard import Service
    from infer.server.logs import configure
    from infer.server.metrics import Metrics
    from infer.server.pool import Pool

    files, listener, metrics = main.named_models(model or []), listen(host, port), Metrics()
    configure(as_json=log_format == "json")
    api_key = api_key or os.environ.get("CHARRNN_API_KEY") or None
    if not is_loopback(host) and api_key is None:
        main.log.warning("serving on %s without an API key: whoever reaches it may use it; see --api-key", host)
    pools = {name: Pool(name, path, metrics, workers, threads, max_streams, max_queue) for name, path in files.items()}
    origins = tuple(cors_origin or ())
    service = Service(pools, metrics, max_tokens_limit, timeout, api_key, origins, loopback=is_loopback(host))
    asyncio.run(main.run(service, listener, drain_timeout))
