"""The page's components in Gradio: the model chooser and the three tabs; predictions.py computes what they show."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import gradio

from charrnn.errors import CharRNNError
from charrnn.vocab import Vocab
from infer.ui import predictions, views
from infer.ui.models import Models

_EXAMPLE = "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
# A larger top-k cuts next to nothing from a vocabulary of characters.
_MAX_TOP_K = 100
# For events that only change the page: not queued, and without a progress sign.
_IMMEDIATE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def _js(function: str) -> str:
    """A call of a function of page.js."""
    return f"() => charrnn.{function}()"


def lay_out(page: gradio.Blocks, models: Models) -> None:
    """Add every component to the open page. Raises: ModelFileError when the first model is damaged."""
    engine = models.engine(models.first)
    names = models.names()
    with gradio.Row(elem_id="head"):
        with gradio.Column(elem_id="names"):
            gradio.HTML('<h1 class="title">charrnn</h1>')
            about = gradio.HTML(views.about(engine), elem_id="about")
        model = gradio.Dropdown(
            names, value=models.first, label="Model", show_label=False, container=False, elem_id="model"
        )
        theme = gradio.Button("◐ Theme", elem_id="theme", size="sm", min_width=90)
    _on_model_choice(models, model, about)
    theme.click(None, js=_js("toggleTheme"))
    page.load(None, js=_js("restoreTheme"))
    # Training may go on while the page is up: a reload lists its new models.
    page.load(lambda: _refreshed(names, models.names()), None, model, show_progress="hidden")
    with gradio.Tabs():
        with gradio.Tab("Generate", id="generate-tab"):
            _generate_tab(models, model, _if_known(engine.vocab, "ROMEO:"))
        with gradio.Tab("Surprisal", id="surprisal-tab"):
            _surprisal_tab(models, model, _if_known(engine.vocab, _EXAMPLE), page)
        with gradio.Tab("Next character", id="next-tab"):
            _next_tab(models, model, _if_known(engine.vocab, "ROMEO:\nWh"), page)


def _refreshed(before: list[str], now: list[str]) -> Any:
    return gradio.skip() if now == before else gradio.Dropdown(now)


def _if_known(vocab: Vocab, text: str) -> str:
    """The example if the first model can read it, else nothing."""
    return "" if vocab.unknown_in(text) else text


def _on_model_choice(models: Models, model: Any, about: Any) -> None:
    """Refuse a model that cannot be loaded, with its error, and keep the one before."""
    usable = gradio.State(models.first)

    def choose(name: str, before: str) -> tuple[str, str, str]:
        try:
            return name, name, views.about(models.engine(name))
        except CharRNNError as error:
            return before, before, views.problem(f"{error}; still using {before}")

    chosen = model.input(choose, [model, usable], [model, usable, about], show_progress="hidden")
    chosen.failure(lambda before: (before, views.busy()), usable, [model, about], **_IMMEDIATE)


def _slider(least: float, most: float, value: float, step: float, label: str, info: str, elem_id: str) -> Any:
    """A slider whose value is NaN while its number field is empty.

    Gradio's own preprocessing would end such a request with a message of its own, or a traceback; predictions.py
    validates the number instead.
    """
    slider: Any = gradio.Slider(least, most, value, step=step, label=label, info=info, elem_id=elem_id)
    slider.preprocess = lambda number: float(number) if isinstance(number, int | float) else math.nan
    return slider


def _sampling_sliders(tab: str) -> list[Any]:
    """Temperature, top-k and top-p, with the element ids TAB-temperature and so on."""
    return [
        _slider(0, 2, 0.8, 0.05, "Temperature", "divides the logits; 0 is greedy", f"{tab}-temperature"),
        _slider(0, _MAX_TOP_K, 0, 1, "Top-k", "keep the k most likely; 0 = off", f"{tab}-top-k"),
        _slider(0.01, 1, 1, 0.01, "Top-p", "nucleus threshold; 1 = off", f"{tab}-top-p"),
    ]


def _generate_tab(models: Models, model: Any, prompt_text: str) -> None:
    with gradio.Row(elem_classes="panes"):
        with gradio.Column(elem_classes="input"):
            prompt = gradio.Textbox(prompt_text, label="Prompt", lines=3, max_lines=3, elem_id="prompt")
            with gradio.Row():
                go = gradio.Button("Generate", variant="primary", min_width=80, elem_id="generate")
                stop = gradio.Button("Stop", variant="stop", min_width=80, interactive=False, elem_id="stop")
        with gradio.Column(elem_classes="output"):
            text = gradio.HTML(views.hint("Press Generate, and the text appears here."), elem_id="paper")
            with gradio.Row(elem_id="status"):
                metrics = gradio.HTML(elem_id="metrics")
                copy = gradio.Button("Copy", size="sm", scale=0, min_width=100, elem_id="copy")
        with gradio.Column(elem_classes="options"):
            length = _slider(1, predictions.MAX_LENGTH, 500, 1, "Length", "characters, or bytes", "length")
            sliders = _sampling_sliders("generate")
            seed = gradio.Textbox("", label="Seed", info="empty = a new one each time", elem_id="seed")

    def generate(name: str, prompt: str, *options: Any) -> Iterator[tuple[Any, str]]:
        try:
            for generated in predictions.generate(models.engine(name), prompt, *options):
                yield views.paper(prompt, generated.text), views.metrics(generated)
        except CharRNNError as error:
            yield gradio.skip(), views.problem(str(error))

    copy.click(None, js=_js("copy"))
    _run_buttons(go, stop, metrics, generate, [model, prompt, length, *sliders, seed], [text, metrics])


def _run_buttons(
    go: Any, stop: Any, metrics: Any, generate: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Connect the buttons: one generation runs at a time, others wait in the queue, and Stop cancels either."""

    def buttons(running: bool) -> tuple[Any, Any]:
        return gradio.Button(interactive=not running), gradio.Button(interactive=running)

    def end(hint: str | None) -> tuple[Any, Any, Any]:
        # None: it failed without having been stopped.
        messages = {views.WAITING: views.hint("stopped before it started"), None: views.busy()}
        return *buttons(False), messages.get(hint, gradio.skip())

    line = [go, stop, metrics]
    started = go.click(lambda: (*buttons(True), views.hint(views.WAITING)), None, line, js=_js("started"), **_IMMEDIATE)
    started.then(None, js=_js("focusStop"))
    running = started.then(generate, inputs, outputs, show_progress="hidden", concurrency_limit=1)
    for over in (
        running.success(lambda: buttons(False), None, [go, stop], **_IMMEDIATE),
        running.failure(end, metrics, line, js=_js("failed"), **_IMMEDIATE),
        stop.click(end, metrics, line, cancels=[running], js=_js("stop"), **_IMMEDIATE),
    ):
        over.then(None, js=_js("focusGenerate"))


def _surprisal_tab(models: Models, model: Any, example: str, page: Any) -> None:
    text = gradio.Textbox(example, label="Text", lines=4, max_lines=4, elem_id="text")
    gradio.HTML(views.legend())
    shown = gradio.HTML(elem_id="surprisal", min_height=260)

    def surprisal(name: str, text: str) -> str:
        try:
            engine = models.engine(name)
            return views.surprisal(predictions.surprisal(engine, text), engine.vocab)
        except CharRNNError as error:
            return views.problem(str(error))

    _on_change([page.load, text.change, model.change], surprisal, [model, text], shown)


def _next_tab(models: Models, model: Any, prompt_text: str, page: Any) -> None:
    with gradio.Row(elem_classes=["panes", "options-first"]):
        with gradio.Column(elem_classes="input"):
            prompt = gradio.Textbox(prompt_text, label="After this text", lines=3, max_lines=3, elem_id="after")
        with gradio.Column(elem_classes="options"):
            sliders = _sampling_sliders("next")
        with gradio.Column(elem_classes="output"):
            shown = gradio.HTML(elem_id="distribution", min_height=660)

    def distribution(name: str, prompt: str, *numbers: float) -> Any:
        if any(map(math.isnan, numbers)):
            return gradio.skip()  # a number is being typed
        try:
            return views.bars(predictions.next_character(models.engine(name), prompt, *numbers))
        except CharRNNError as error:
            return views.problem(str(error))

    changes = [page.load, prompt.change, model.change, *(slider.change for slider in sliders)]
    _on_change(changes, distribution, [model, prompt, *sliders], shown)


def _on_change(changes: list[Any], compute: Any, inputs: list[Any], shown: Any) -> None:
    """Recompute after each change; of several in quick succession, after the last."""
    event = gradio.on(changes, compute, inputs, shown, trigger_mode="always_last", show_progress="hidden")
    event.failure(views.busy, None, shown, **_IMMEDIATE)
