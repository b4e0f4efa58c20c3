"""The `infer` command line. What runs a model is imported inside the commands, so that help appears at once."""

import contextlib
import errno
import io
import itertools
import os
import signal
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from charrnn import __version__
from charrnn.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_FAULT,
    CharRNNError,
    ConfigError,
    listing,
)

# Typer exports only this leaf of its usage errors, and has moved their base between versions.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

# What a disk without space, a broken one, and (on Windows) a pipe without a reader answer to a write.
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF} | ({errno.EINVAL} if os.name == "nt" else set())

app = typer.Typer(
    help="Write text with a charrnn model file, look into one, or measure one on a text.",
    context_settings={"help_option_names": ["-h", "--help"]},
    # Plain help and errors: they start faster, look the same everywhere, and never dump local variables.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Unknown(StrEnum):
    """What to do with characters that the vocabulary lacks."""

    ERROR = "error"
    SKIP = "skip"
    REPLACE = "replace"


class Split(StrEnum):
    """Which part of a text, by the fractions the model was trained with."""

    ALL = "all"
    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class LogFormat(StrEnum):
    """Form of the server's log lines."""

    TEXT = "text"
    JSON = "json"


ModelOption = Annotated[
    Path | None, typer.Option("-m", "--model", help="Model file (.onnx).  [default: the shipped model]")
]
UnknownOption = Annotated[
    Unknown,
    typer.Option(help="Characters the model does not know: list them and stop, drop them, or put its replacement."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads; the text does not depend on them.  [default: as many as help, on free cores]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


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
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Text to go on from; - reads it from standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to go on from.")] = None,
    length: Annotated[int, typer.Option("-n", "--length", help="Characters to write.")] = 500,
    temperature: Annotated[
        float,
        typer.Option("--temp", "--temperature", help="Higher is more surprising; 0 always takes the likeliest."),
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among the K likeliest characters; 0 = all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest that together hold this probability; 1 = all.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw among those at least this share as likely as the likeliest; 0 = all.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was just written becomes less likely. 1 = off.")
    ] = 1.0,
    repetition_window: Annotated[
        int, typer.Option(help="Characters that the repetition penalty looks back on; 0 = all.")
    ] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest character: --temp 0.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.  [default: a new one each time]")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(help="Texts to write, computed side by side with seeds SEED, SEED + 1, ...")
    ] = 1,
    stop: Annotated[str | None, typer.Option(help="End before the first occurrence of this text.")] = None,
    past_end: Annotated[
        bool, typer.Option("--past-end", help="Go on where a document ends, if the model knows of documents.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print characters as they come.")] = True,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before the text.")] = True,
    unknown: UnknownOption = Unknown.ERROR,
    stats: Annotated[bool, typer.Option("--stats", help="Report seed, times and speed on standard error.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Write text that goes on from a prompt.

    Without a prompt it starts from a newline, or from the vocabulary's first character if it has no newline; that
    character is not printed. For a model that knows of documents the prompt is the beginning of one, and the text ends
    where it does. A line break ends the output.
    """
    from charrnn.sampling import SamplingOptions
    from infer.engine import Engine, fresh_seed
    from infer.report import Timing
    from infer.texts import decode, on_terminal

    raw, what = _prompt_source(prompt, prompt_file)
    timing = Timing()
    engine = Engine(model, threads, streams=num_samples)
    timing.loaded = perf_counter()
    text = decode(raw, what, engine.vocab)
    seed = fresh_seed() if seed is None else seed
    options = SamplingOptions(
        0.0 if greedy else temperature, top_k, top_p, min_p, repetition_penalty, repetition_window
    )
    rest: dict[str, Any] = {
        "length": length, "options": options, "seed": seed, "stop": stop, "past_end": past_end,
        "unknown": unknown.value,
    }  # fmt: skip
    lead = engine.vocab.decode(engine.vocab.encode(text, unknown.value)) if echo else ""
    pieces: Iterable[str]
    if num_samples == 1:
        pieces = itertools.chain([lead], timing.count(engine.generate(text, **rest)), ["\n"])
    else:
        texts = timing.count(engine.generate_batch(text, num_samples, **rest))
        pieces = (f"--- sample {i} (seed {seed + i - 1}) ---\n{lead}{t}\n" for i, t in enumerate(texts, 1))
    _warn_of_unknown(engine.vocab.unknown_in(text), unknown)
    for piece in pieces if stream else ["".join(pieces)]:
        _print(on_terminal(piece) if sys.stdout is not None and sys.stdout.isatty() else piece)
    if stats:
        typer.echo(timing.report(seed), err=True)


@app.command()
def info(
    model_file: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Model file (.onnx).  [default: the shipped model]")
    ] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model file is, what it knows, and where it came from."""
    from infer.engine import Engine
    from infer.report import describe_model, model_facts, to_json

    engine = Engine(_one_model(model_file, model))
    facts = model_facts(engine)
    _print((to_json(facts) if as_json else describe_model(facts)) + "\n")


@app.command()
def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model file (.onnx).")],
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="Text to score; - reads it from standard input.")],
    split: Annotated[
        Split, typer.Option(help="Part of the text, by the fractions of the model's training.")
    ] = Split.ALL,
    unknown: UnknownOption = Unknown.ERROR,
    as_json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure how well a model predicts a text.

    Two figures, never mixed: `stream` reads the text once with the state carried along; `windows` reads windows of
    256 characters (or what the model was validated with), each from a zero state.
    """
    from infer import scoring
    from infer.engine import Engine
    from infer.report import describe_scores, score_facts, to_json
    from infer.texts import read_bytes

    engine = Engine(model, threads)
    text = scoring.read_text(engine, read_bytes(file, "text"), split.value, unknown.value)
    scores = scoring.score(engine, text.ids)
    _warn_of_unknown(text.unknown, unknown)
    facts = score_facts(str(model), file, split.value, text, scores)
    _print((to_json(facts) if as_json else describe_scores(facts)) + "\n")


@app.command()
def bench(
    model_file: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Model file (.onnx).  [default: the shipped model]")
    ] = None,
    model: ModelOption = None,
    rounds: Annotated[int, typer.Option(help="Times that each figure is taken.", min=2)] = 7,
    temperature: Annotated[float, typer.Option("--temp", "--temperature", help="As for generate.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="As for generate.")] = 40,
    top_p: Annotated[float, typer.Option(help="As for generate.")] = 1.0,
    as_json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure how fast a model file writes.

    Start, first text, characters a second of 1, 8 and 64 streams, and what the machine's memory would allow.
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
        Path | None,
        typer.Option(help="Folder whose model files can be chosen.  [default: checkpoints, if there is one]"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
) -> None:
    """Serve a page that writes text (needs: pip install 'charrnn[ui]')."""
    from infer.ui.app import serve

    serve(model, models, host, port)


@app.command()
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
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes per model, each with its own copy.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="CPU threads per worker.")] = 1,
    max_streams: Annotated[
        int, typer.Option(min=1, max=65536, help="Texts that a worker generates at once; more wait.")
    ] = 512,
    max_queue: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Texts per model that may wait; more are answered with 429.")
    ] = 512,
    max_tokens_limit: Annotated[
        int, typer.Option(min=1, max=1_000_000_000, help="Most characters a text may ask for.")
    ] = 100_000,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request fails.")] = 600,
    drain_timeout: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds that requests have to finish after SIGTERM or Ctrl-C.")
    ] = 10,
    api_key: Annotated[
        str | None, typer.Option(help="Key that requests to /v1 must bring; better in CHARRNN_API_KEY.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Site whose pages may use the API; repeat for several; * is all.")
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Form of log lines on standard error.")] = LogFormat.TEXT,
) -> None:
    """Serve models by an OpenAI-compatible API (needs: pip install 'charrnn[serve]').

    POST /v1/completions, GET /v1/models, /health, /metrics. Requests run in one batch, which they join and leave at
    every character. Ctrl-C or SIGTERM lets those that run finish.
    """
    from infer.server import main

    main.serve(
        model or [], host=host, port=port, workers=workers, threads=threads, max_streams=max_streams,
        max_queue=max_queue, max_tokens_limit=max_tokens_limit, timeout=timeout, drain_timeout=drain_timeout,
        api_key=api_key, cors_origins=cors_origin or [], log_json=log_format is LogFormat.JSON,
    )  # fmt: skip


def _print(text: str) -> None:
    """Writes to standard output at once. Raises: ConfigError when that is closed; OSError when it takes no more."""
    if sys.stdout is None:
        raise ConfigError("standard output is closed; open it, or send it to a file")
    sys.stdout.write(text)
    sys.stdout.flush()


def _one_model(argument: Path | None, option: Path | None) -> Path | None:
    if argument and option:
        raise ConfigError(f"two model files were given, {argument} and -m {option}; give one")
    return argument or option


def _prompt_source(prompt: str | None, prompt_file: Path | None) -> tuple[bytes, str]:
    """The prompt's bytes, and what to call it in a message."""
    from infer.texts import read_bytes

    if prompt is not None and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file were both given; give one")
    if prompt_file is not None:
        return read_bytes(str(prompt_file), "prompt file"), f"prompt file {prompt_file}"
    if prompt == "-":
        return read_bytes("-", "prompt"), "the prompt on standard input"
    # A shell's bytes that are not UTF-8 arrive as lone surrogates; as bytes again they meet the same check.
    return (prompt or "").encode("utf-8", "surrogateescape"), "the prompt"


def _warn_of_unknown(characters: list[str], unknown: Unknown) -> None:
    if characters:
        done = "dropped" if unknown is Unknown.SKIP else "replaced"
        names = listing([repr(character) for character in characters])
        typer.echo(f"note: characters that the model does not know were {done}: {names}", err=True)


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; what the user did wrong becomes one line on standard error."""
    try:
        # Without arguments: the help, as an answer and not as a fault.
        code = app(arguments or ["--help"], prog_name="infer", standalone_mode=False)
    except CharRNNError as error:
        return _fail(str(error))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "infer"
        return _fail(f"{error.format_message().rstrip('.')}; see: {command} --help")
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            raise
        _abandon_output()
        return _fail(f"cannot write to standard output: {error.strerror}")
    except MemoryError:
        return _fail("there is not enough memory for this; ask for fewer or shorter texts, or give it a shorter one")
    if code == EXIT_INTERRUPTED:
        typer.echo(err=True)
    return int(code or EXIT_DONE)


def _abandon_output() -> None:
    """What is left unwritten is dropped: Python would try to write it once more when it ends, and complain."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    typer.echo(f"error: {CharRNNError(' '.join(message.split()))}", err=True)
    return EXIT_USER_FAULT


def main() -> None:
    """The console script."""
    if hasattr(signal, "SIGPIPE"):
        # A reader that stops reading (infer ... | head) ends us quietly, as it ends every other program.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # The texts are UTF-8 with \n for a line end, whatever the locale and the system say.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
