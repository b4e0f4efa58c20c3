"""The commands of `infer` and their options. Each imports what runs a model, so that help appears at once."""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import typer

from charrnn import __version__
from charrnn.errors import ConfigError, escape_control, listing
from infer.server.command import serve

ModelArgument = Annotated[
    Path | None, typer.Argument(metavar="[MODEL]", help="Model file (.onnx).  [default: the shipped model]")
]
ModelOption = Annotated[
    Path | None, typer.Option("-m", "--model", help="Model file (.onnx).  [default: the shipped model]")
]
UnknownOption = Annotated[
    Literal["error", "skip", "replace"],
    typer.Option(help="Characters not in the vocabulary: list and refuse, drop, or replace them."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads; the text does not depend on them.  [default: by model size and free cores]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TemperatureOption = Annotated[
    float, typer.Option("--temp", "--temperature", help="Divides the logits; 0 is greedy decoding.")
]
TopKOption = Annotated[int, typer.Option(help="Keep the K most likely characters; 0 = all.")]
TopPOption = Annotated[float, typer.Option(help="Nucleus (top-p) threshold; 1 = all.")]

app = typer.Typer(
    help="Generate text with a charrnn model file, inspect it, score a text with it, or measure its speed.",
    context_settings={"help_option_names": ["-h", "--help"]},
    # Plain help and errors start faster, look the same everywhere, and never dump local variables.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"charrnn {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    model: ModelOption = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Prompt; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt.")] = None,
    length: Annotated[int, typer.Option("-n", "--length", help="Characters to generate.")] = 500,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep characters at least this fraction as likely as the most likely one; 0 = all.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, makes recent characters less likely; 1 = off.")
    ] = 1.0,
    repetition_window: Annotated[
        int, typer.Option(help="Recent characters that the repetition penalty applies to; 0 = all.")
    ] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding: --temp 0.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Random seed: the same seed gives the same text.  [default: a new one each time]")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(help="Texts to generate as one batch, with seeds SEED, SEED + 1, ...")
    ] = 1,
    stop: Annotated[str | None, typer.Option(help="Stop before the first occurrence of this text.")] = None,
    past_end: Annotated[
        bool, typer.Option("--past-end", help="Continue after the end of a document, if the model has documents.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the text while it is generated.")] = True,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before the text.")] = True,
    unknown: UnknownOption = "error",
    stats: Annotated[bool, typer.Option("--stats", help="Report seed, times and speed on standard error.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Generate text that continues a prompt.

    Without a prompt it starts from a newline, or from the first character of a vocabulary without one; that character
    is not printed. For a model with documents the prompt is the beginning of one, and the text ends where the document
    does. A newline ends the output.
    """
    from charrnn.sampling import SamplingOptions
    from infer.engine import Engine, fresh_seed
    from infer.report import Timing
    from infer.text_io import decode

    raw, name = _read_prompt(prompt, prompt_file)
    timing = Timing()
    engine = Engine(model, threads, streams=num_samples)
    timing.loaded = perf_counter()
    text = decode(raw, name, engine.vocab)
    seed = fresh_seed() if seed is None else seed
    temperature = 0.0 if greedy else temperature
    options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, repetition_window)
    how: dict[str, Any] = {"seed": seed, "stop": stop, "past_end": past_end, "unknown": unknown}
    lead = engine.vocab.decode(engine.vocab.encode(text, unknown)) if echo else ""
    pieces: Iterable[str]
    if num_samples == 1:
        pieces = itertools.chain([lead], timing.count(engine.generate(text, length, options, **how)), ["\n"])
    else:
        texts = timing.count(engine.generate_batch(text, num_samples, length, options, **how))
        pieces = (f"--- sample {i} (seed {seed + i - 1}) ---\n{lead}{t}\n" for i, t in enumerate(texts, 1))
    _warn_of_unknown(engine.vocab.unknown_in(text), unknown)
    for piece in pieces if stream else ["".join(pieces)]:
        _print(escape_control(piece) if sys.stdout is not None and sys.stdout.isatty() else piece)
    if stats:
        _logger().info(timing.report(seed))


@app.command()
def info(model_file: ModelArgument = None, model: ModelOption = None, as_json: JsonOption = False) -> None:
    """Describe a model file: architecture, vocabulary, training, validation loss."""
    from infer.engine import Engine
    from infer.report import format_model, model_info, to_json

    facts = model_info(Engine(_one_model(model_file, model)))
    _print((to_json(facts) if as_json else format_model(facts)) + "\n")


@app.command()
def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model file (.onnx).")],
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="Text to score; - reads standard input.")],
    split: Annotated[
        Literal["all", "train", "val", "test"],
        typer.Option(help="Part of the text, by the split that the model was trained with."),
    ] = "all",
    unknown: UnknownOption = "error",
    as_json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure a model's loss on a text.

    Two protocols: `stream` carries the state over the whole text; `windows` resets it at every window of 256 characters
    (or what the model was validated with).
    """
    from infer import scoring
    from infer.engine import Engine
    from infer.report import format_scores, score_info, to_json
    from infer.text_io import read_bytes

    engine = Engine(model, threads)
    text = scoring.read_text(engine, read_bytes(file, "text"), split, unknown)
    scores = scoring.score(engine, text.ids)
    _warn_of_unknown(text.unknown, unknown)
    facts = score_info(str(model), file, split, text, scores)
    _print((to_json(facts) if as_json else format_scores(facts)) + "\n")


@app.command()
def bench(
    model_file: ModelArgument = None,
    model: ModelOption = None,
    rounds: Annotated[int, typer.Option(help="Times that each measurement is repeated.", min=2)] = 7,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 40,
    top_p: TopPOption = 1.0,
    as_json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure a model file's generation speed.

    Start-up, time to the first text, and characters/s of 1, 8 and 64 streams.
    """
    from charrnn.sampling import SamplingOptions
    from infer import bench as benchmark
    from infer.engine import Engine
    from infer.report import to_json

    engine = Engine(_one_model(model_file, model), threads)
    report = benchmark.bench(engine, rounds, SamplingOptions(temperature, top_k, top_p))
    _print((to_json(report) if as_json else benchmark.table(report)) + "\n")


@app.command()
def ui(
    model: ModelOption = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of model files to choose from.  [default: checkpoints, if there is one]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 serves other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to bind.")] = 7860,
) -> None:
    """Serve a page that generates text (needs: pip install 'charrnn[ui]')."""
    from infer.ui import app as page

    _logger()
    page.serve(model, models, host, port)


app.command()(serve)


def _print(text: str) -> None:
    """Write to standard output at once. Raises: ConfigError when it is closed; OSError when it takes no more."""
    if sys.stdout is None:
        raise ConfigError("standard output is closed; open it, or redirect it to a file")
    sys.stdout.write(text)
    sys.stdout.flush()


def _one_model(argument: Path | None, option: Path | None) -> Path | None:
    if argument is not None and option is not None:
        raise ConfigError(f"two model files were given, {argument} and -m {option}; give one")
    return option if argument is None else argument


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> tuple[bytes, str]:
    """Return the prompt's bytes, and its name in messages."""
    from infer.text_io import read_bytes

    if prompt is not None and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file were both given; give one")
    if prompt_file is not None:
        return read_bytes(str(prompt_file), "prompt file"), f"prompt file {prompt_file}"
    if prompt == "-":
        return read_bytes("-", "prompt"), "the prompt on standard input"
    # Arguments that are not UTF-8 arrive as lone surrogates; as bytes again they fail the check of all texts.
    return (prompt or "").encode("utf-8", "surrogateescape"), "the prompt"


def _warn_of_unknown(characters: list[str], unknown: str) -> None:
    if characters:
        done = "dropped" if unknown == "skip" else "replaced"
        names = listing([repr(character) for character in characters])
        _logger().warning("characters not in the vocabulary were %s: %s", done, names)


def _logger() -> Any:
    """Return this program's logger; importing logging takes a millisecond, and most commands log nothing."""
    import logging

    from charrnn.log import configure_logging

    configure_logging()
    return logging.getLogger(__package__)
