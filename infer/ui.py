"""The Gradio page: a prompt, the sampling options, and text that streams in. Bound to loopback unless asked."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from charrnn.errors import CharRNNError, ConfigError

if TYPE_CHECKING:
    from infer.engine import Engine

MOST_CHARS = 5000
MOST_PROMPT_CHARS = 2000
_QUEUE = 16
# Pieces sent to the page at once: one by one they would cost more to send than to compute.
_PIECES = 12


def stream(
    engine: "Engine", prompt: str, length: float, temperature: float, top_k: float, top_p: float, seed: float
) -> Iterator[str]:
    """The prompt and the growing text after it. Raises: CharRNNError as Engine.generate does."""
    text, waiting = prompt, 0
    options: dict[str, Any] = {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}
    for piece in engine.generate(prompt, length=int(length), seed=int(seed), **options):
        text += piece
        waiting += 1
        if waiting == _PIECES:
            yield text
            waiting = 0
    yield text


def build_page(engine: "Engine") -> Any:
    """The page for one model, as a Gradio Blocks. Raises: ConfigError when Gradio is not installed."""
    # Read when Gradio is imported; nothing is sent anywhere.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ConfigError("the page needs Gradio, which is not installed: pip install 'charrnn[ui]'") from None

    def write(*values: Any) -> Iterator[str]:
        try:
            yield from stream(engine, *values)
        except CharRNNError as error:
            raise gradio.Error(str(error)) from None

    start = "ROMEO:" if not engine.vocab.unknown_in("ROMEO:") else ""
    with gradio.Blocks(title="charrnn", analytics_enabled=False) as page:
        gradio.Markdown(f"# charrnn\n`{engine.path.name}`")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                inputs = [
                    gradio.Textbox(start, label="Prompt", lines=3, max_length=MOST_PROMPT_CHARS),
                    gradio.Slider(1, MOST_CHARS, 500, step=1, label="Length (characters)"),
                    gradio.Slider(0, 2, 0.8, step=0.05, label="Temperature (0 = always the likeliest)"),
                    gradio.Slider(0, len(engine.vocab), 0, step=1, label="Top-k (0 = all)"),
                    gradio.Slider(0.01, 1, 1, step=0.01, label="Top-p (1 = all)"),
                    gradio.Number(1, label="Seed", precision=0, minimum=0),
                ]
                with gradio.Row():
                    go = gradio.Button("Write", variant="primary")
                    stop = gradio.Button("Stop")
            with gradio.Column(scale=2, min_width=320):
                text = gradio.Textbox(label="Text", lines=24, max_lines=24, interactive=False)
        running = go.click(write, inputs, text)
        stop.click(None, cancels=[running])
    page.queue(max_size=_QUEUE, default_concurrency_limit=1)
    return page


def serve(engine: "Engine", host: str, port: int) -> None:
    """Serves the page until it is interrupted. Raises: ConfigError when the port is taken."""
    page = build_page(engine)
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=False)
    except OSError as error:
        raise ConfigError(
            f"cannot serve on {host}:{port}: {' '.join(str(error).split())}; choose another --port"
        ) from None
