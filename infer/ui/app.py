"""The Gradio page of `infer ui`. Bound to loopback unless asked; it loads nothing from elsewhere and sends nothing."""

import contextlib
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from charrnn.errors import ConfigError
from infer.ui.models import Models

# Requests that may wait for their turn; one more is refused.
MOST_WAITING = 16


def build_page(models: Models) -> Any:
    """The page over these models, as a Gradio Blocks; `launch_options` complete it.

    Raises: ConfigError when Gradio is not installed; ModelFileError when the first model is damaged.
    """
    # Read when Gradio is imported; nothing is sent anywhere.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio, which is not installed: pip install 'charrnn[ui]'")
    import gradio

    from infer.ui.tabs import lay_out

    with gradio.Blocks(title="charrnn", analytics_enabled=False) as page:
        lay_out(page, models)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    return page


def launch_options(page: Any, host: str = "127.0.0.1") -> dict[str, Any]:
    """What every launch of the page needs besides its address: theme, style sheet, script, guard, and no sharing."""
    from starlette.middleware import Middleware

    from infer.ui import style as page_style
    from infer.ui.guard import Guard

    guard = Middleware(Guard, host=host, inputs=_inputs(page))
    return {
        "app_kwargs": {"middleware": [guard], "openapi_url": None},
        "theme": page_style.theme(),
        "css": page_style.CSS,
        "head": page_style.HEAD,
        "share": False,
        "ssr_mode": False,
    }


def _inputs(page: Any) -> dict[int, list[tuple[type, ...]]]:
    """The types of what each function of the page takes from the browser: of sliders a number, of states nothing.

    Those that run in the browser alone are left out.
    """
    kinds: dict[str, tuple[type, ...]] = {"slider": (int, float, str, type(None)), "state": (type(None),)}
    return {
        number: [kinds.get(part.get_block_name(), (str, type(None))) for part in function.inputs]
        for number, function in page.fns.items()
        if function.fn is not None
    }


def serve(model: str | os.PathLike[str] | None, folder: Path | None, host: str, port: int) -> None:
    """Serves the page until it is interrupted.

    model: the first one; None is the shipped model. folder: whose *.onnx files can be chosen as well; None is
    `checkpoints` below the current folder, if there is one.
    Raises: ConfigError when Gradio is missing, the folder is none, or the port is taken; ModelFileError.
    """
    page = build_page(Models(model, folder))
    _check_address(host, port)
    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            **launch_options(page, host),
        )
    except OSError as error:
        raise ConfigError(
            f"cannot serve on {host}:{port}: {' '.join(str(error).split())}; choose another --port"
        ) from None
    print(f"the page is at {url} (Ctrl-C ends it)", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)  # a wait without an end could not be interrupted on Windows
    page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Raises ConfigError for an address that cannot be served on: Gradio would only speak of its port."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            if os.name == "posix":  # as servers do there: a port whose last server has just ended is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"cannot serve on {host!r}: {error.strerror}; choose another --host") from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot serve on {host}:{port}: {reason}; choose another --port or --host") from None
