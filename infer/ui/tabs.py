"""The page's parts in Gradio: the models' chooser and the three tabs. What happens in them is computed in page_text."""

import math
from collections.abc import Iterator
from typing import Any

import gradio

from charrnn.errors import CharRNNError
from charrnn.vocab import Vocab
from infer.ui import style as page_style
from infer.ui import views as page_html
from infer.ui.compute import MOST_CHARS, next_character, read, stream
from infer.ui.models import Models

_EXAMPLE = "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
# Above it top-k cuts next to nothing from a vocabulary of characters.
_MOST_TOP_K = 100
# For what happens at once: it does not wait in the queue, and nothing turns meanwhile.
_AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def lay_out(page: gradio.Blocks, models: Models) -> None:
    """Puts everything into the page, which is open. Raises: ModelFileError when the first model is damaged."""
    vocab = models.engine(models.first).vocab
    names = models.names()
    with gradio.Row(elem_id="head"):
        with gradio.Column(elem_id="names"):
            gradio.HTML('<h1 class="title">charrnn</h1>')
            about = gradio.HTML(page_html.about(models.engine(models.first)), elem_id="about")
        model = gradio.Dropdown(
            names, value=models.first, label="Model", show_label=False, container=False, elem_id="model"
        )
        toggle = gradio.Button("◐ Theme", elem_id="theme", size="sm", min_width=90)
    _choosing(models, model, about)
    toggle.click(None, js=page_style.TOGGLE_THEME)
    page.load(None, js=page_style.RESTORE_THEME)
    # Training goes on while the page is up: its later models are there after a reload.
    page.load(lambda: _renewed(names, models.names()), None, model, show_progress="hidden")
    with gradio.Tabs():
        with gradio.Tab("Write", id="write"):
            _write_tab(models, model, _if_known(vocab, "ROMEO:"))
        with gradio.Tab("What it expects", id="read"):
            _read_tab(models, model, _if_known(vocab, _EXAMPLE), page)
        with gradio.Tab("Next character", id="next"):
            _next_tab(models, model, _if_known(vocab, "ROMEO:\nWh"), page)


def _renewed(before: list[str], now: list[str]) -> Any:
    """The chooser with the models there are now; left alone when they are the same."""
    return gradio.skip() if now == before else gradio.Dropdown(now)


def _if_known(vocab: Vocab, text: str) -> str:
    """An example that the first model can read, or nothing."""
    return "" if vocab.unknown_in(text) else text


def _choosing(models: Models, model: Any, about: Any) -> None:
    """A chosen model that cannot be loaded is refused with its fault, and the one before it stays."""
    usable = gradio.State(models.first)

    def choose(name: str, before: str) -> tuple[str, str, str]:
        try:
            return name, name, page_html.about(models.engine(name))
        except CharRNNError as error:
            return before, before, page_html.problem(f"{error}; still using {before}")

    chosen = model.input(choose, [model, usable], [model, usable, about], show_progress="hidden")
    chosen.failure(lambda before: (before, page_html.busy()), usable, [model, about], **_AT_ONCE)


def _slider(least: float, most: float, value: float, step: float, label: str, info: str, elem_id: str) -> Any:
    """A slider that hands on what its field holds: NaN while it is empty.

    Gradio's own would stop such a request with words of its own, and an empty field with a traceback; what is computed
    from the numbers judges them, and says so on the page.
    """
    slider: Any = gradio.Slider(least, most, value, step=step, label=label, info=info, elem_id=elem_id)
    slider.preprocess = lambda number: float(number) if isinstance(number, int | float) else math.nan
    return slider


def _sampling_sliders(tab: str) -> list[Any]:
    """Temperature, top-k and top-p, as elements TAB-temperature and so on."""
    return [
        _slider(0, 2, 0.8, 0.05, "Temperature", "0 always takes the likeliest", f"{tab}-temperature"),
        _slider(0, _MOST_TOP_K, 0, 1, "Top-k", "draw among the k likeliest; 0 = all", f"{tab}-top-k"),
        _slider(0.01, 1, 1, 0.01, "Top-p", "draw among those with this share; 1 = all", f"{tab}-top-p"),
    ]


def _write_tab(models: Models, model: Any, prompt_text: str) -> None:
    with gradio.Row(elem_classes="panes"):
        with gradio.Column(elem_classes="asked"):
            prompt = gradio.Textbox(prompt_text, label="Prompt", lines=3, max_lines=3, elem_id="prompt")
            with gradio.Row():
                go = gradio.Button("Write", variant="primary", min_width=80, elem_id="go")
                stop = gradio.Button("Stop", variant="stop", min_width=80, interactive=False, elem_id="stop")
        with gradio.Column(elem_classes="shown"):
            text = gradio.HTML(page_html.hint("Press Write, and the text appears here."), elem_id="paper")
            with gradio.Row(elem_id="written-line"):
                figures = gradio.HTML(elem_id="figures")
                copy = gradio.Button("Copy", size="sm", scale=0, min_width=100, elem_id="copy")
        with gradio.Column(elem_classes="options"):
            length = _slider(1, MOST_CHARS, 500, 1, "Length", "characters, or bytes", "length")
            sliders = _sampling_sliders("write")
            seed = gradio.Textbox("", label="Seed", info="empty = a new one each time", elem_id="seed")

    def write(name: str, prompt: str, *options: Any) -> Iterator[tuple[Any, str]]:
        try:
            for written in stream(models.engine(name), prompt, *options):
                yield page_html.paper(prompt, written.text), page_html.figures(written)
        except CharRNNError as error:
            yield gradio.skip(), page_html.problem(str(error))

    def buttons(running: bool) -> tuple[Any, Any]:
        return gradio.Button(interactive=not running), gradio.Button(interactive=running)

    def end(shown: str | None) -> tuple[Any, Any, Any]:
        # None: it failed without having been stopped.
        told = {page_html.WAITING: page_html.stopped_waiting(), None: page_html.busy()}
        return *buttons(False), told.get(shown, gradio.skip())

    line = [go, stop, figures]
    # One text is written at a time; until those of others are done, the line says that this one waits.
    started = go.click(
        lambda: (*buttons(True), page_html.hint(page_html.WAITING)), None, line, js=page_style.STARTING, **_AT_ONCE
    )
    started.then(None, js=page_style.FOCUS_STOP)
    running = started.then(
        write, [model, prompt, length, *sliders, seed], [text, figures], show_progress="hidden", concurrency_limit=1
    )
    for over in (
        running.success(lambda: buttons(False), None, [go, stop], **_AT_ONCE),
        running.failure(end, figures, line, js=page_style.FAILED, **_AT_ONCE),
        stop.click(end, figures, line, cancels=[running], js=page_style.STOPPING, **_AT_ONCE),
    ):
        over.then(None, js=page_style.FOCUS_WRITE)
    copy.click(None, js=page_style.COPY)


def _read_tab(models: Models, model: Any, example: str, page: Any) -> None:
    text = gradio.Textbox(example, label="Text", lines=4, max_lines=4, elem_id="text")
    gradio.HTML(page_html.legend())
    shown = gradio.HTML(elem_id="surprise", min_height=260)

    def surprise(name: str, text: str) -> str:
        try:
            engine = models.engine(name)
            return page_html.surprises(read(engine, text), engine.vocab)
        except CharRNNError as error:
            return page_html.problem(str(error))

    _whenever([page.load, text.change, model.change], surprise, [model, text], shown)


def _next_tab(models: Models, model: Any, prompt_text: str, page: Any) -> None:
    with gradio.Row(elem_classes=["panes", "sliders-first"]):
        with gradio.Column(elem_classes="asked"):
            prompt = gradio.Textbox(prompt_text, label="After this text", lines=3, max_lines=3, elem_id="after")
        with gradio.Column(elem_classes="options"):
            sliders = _sampling_sliders("next")
        with gradio.Column(elem_classes="shown"):
            shown = gradio.HTML(elem_id="odds", min_height=660)

    def odds(name: str, prompt: str, *numbers: float) -> Any:
        if any(map(math.isnan, numbers)):
            return gradio.skip()  # until the number that is being typed is there
        try:
            return page_html.bars(next_character(models.engine(name), prompt, *numbers))
        except CharRNNError as error:
            return page_html.problem(str(error))

    changes = [page.load, prompt.change, model.change, *(slider.change for slider in sliders)]
    _whenever(changes, odds, [model, prompt, *sliders], shown)


def _whenever(changes: list[Any], compute: Any, inputs: list[Any], shown: Any) -> None:
    """Shows what is computed from the inputs after each change; of changes in quick succession, after the last."""
    event = gradio.on(changes, compute, inputs, shown, trigger_mode="always_last", show_progress="hidden")
    event.failure(page_html.busy, None, shown, **_AT_ONCE)
