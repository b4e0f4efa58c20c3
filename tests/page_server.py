"""The page of `infer ui`, served to a test from a thread."""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

from infer.ui.app import build_page, build_server, listen
from infer.ui.models import Models


@contextlib.contextmanager
def page_server(models: Models, host: str = "127.0.0.1") -> Iterator[SimpleNamespace]:
    """Yields the page's Blocks and where it is served: `blocks`, `netloc`, `url`."""
    blocks = build_page(models)
    with listen(host, 0) as listener:
        server = build_server(blocks, host)
        # No daemon, and so neither are its workers: onnxruntime aborts a process that exits during a run.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=False)
        thread.start()
        port = listener.getsockname()[1]
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            yield SimpleNamespace(blocks=blocks, netloc=netloc, url=f"http://{netloc}/")
        finally:
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive()
