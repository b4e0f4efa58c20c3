"""The entry of `accelerate launch train/main.py`: options -> config -> run -> model.onnx."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from charrnn.cli import ResilientStream, run_command
from charrnn.config import UNSIZED, RunConfig, load_config
from charrnn.errors import EXIT_USER_ERROR
from train.given_text import Encoding, Exclude, Include, TextField

# torchrun ends all processes once one has failed: the one that reports an error common to all must exit first.
_REPORT_S = 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _option(key: str, help_text: str = "", **extra: Any) -> Any:
    """An option for the config field "section.key": its default, and unless given its help, are the field's."""
    section, name = key.split(".")
    field = type(getattr(RunConfig(), section)).model_fields[name]
    text = help_text or f"{(field.description or '')[:1].upper()}{(field.description or '')[1:]}."
    return typer.Option(help=text, **{"show_default": str(field.default) or "none", **extra})


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Experiment to run, a YAML file.", show_default="sized to the text"),
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "data.source",
            "Text to train on: a file, folder, glob, URL, hf:NAME, - for standard input, or a corpus name "
            "(shakespeare, tinyshakespeare, enwik8, text8, novels, python). See docs/data.md.",
            metavar="PATH|NAME|URL|-",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    text_field: TextField = None,
    vocab: Annotated[str | None, _option("data.vocab", metavar="chars|bytes|FILE|keep")] = None,
    rnn: Annotated[
        Literal["GRU", "LSTM"] | None, _option("model.rnn", case_sensitive=False, metavar="GRU|LSTM")
    ] = None,
    epochs: Annotated[float | None, _option("train.epochs")] = None,
    max_steps: Annotated[int | None, _option("train.max_steps")] = None,
    time_limit: Annotated[str | None, _option("train.time_limit", metavar="DURATION")] = None,
    run_dir: Annotated[
        str | None, _option("train.run_dir", metavar="DIR", show_default="checkpoints/[<config>-]<corpus>")
    ] = None,
    seed: Annotated[int | None, _option("train.seed")] = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="auto: resume from the run folder's newest checkpoint. never: refuse if it has one."),
    ] = "auto",
    init_from: Annotated[
        str | None,
        _option("train.init_from", metavar="base|none|CKPT", show_default="base where it helps; none with --config"),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN|CKPT",
            help="Run or checkpoint whose probabilities to train on too; repeatable.",
            show_default="none",
        ),
    ] = None,
    tracker: Annotated[
        Literal["none", "wandb", "tensorboard"] | None, _option("tracking.tracker", metavar="wandb|tensorboard|none")
    ] = None,
    data_mirror: Annotated[str | None, _option("data.mirror", metavar="DIR")] = None,
    encoding: Encoding = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set any field of configs/plain.yaml; repeatable."),
    ] = None,
) -> None:
    """Train a character-level GRU or LSTM on a text, and export the best checkpoint as one ONNX file.

    Without --config, model and schedule are sized to the text, the machine's speed and --time-limit; options given
    here take precedence. The defaults shown are those of configs/plain.yaml. Rerun the same command to resume.
    """
    options = {
        "data.source": data,
        "data.include": include or None,
        "data.exclude": exclude or None,
        "data.text_field": text_field,
        "data.vocab": vocab,
        "model.rnn": rnn,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.time_limit": time_limit,
        "train.run_dir": run_dir,
        "train.seed": seed,
        "train.init_from": init_from,
        "distill.teachers": teacher or None,
        "tracking.tracker": tracker,
        "data.mirror": data_mirror,
        "data.encoding": encoding,
    }
    given = {key: value for key, value in options.items() if value is not None}
    assigned = tuple(assignments or ())
    from charrnn.data.download import without_credentials  # imports numpy

    sys.argv[1:] = map(without_credentials, sys.argv[1:])  # W&B records them
    resolved = load_config(config, {**({} if config else UNSIZED), **given}, assigned)
    # torch takes a second to import: after the options have been checked.
    from train.recipe.size_run import UserSettings
    from train.run import run

    user_settings = None if config else UserSettings(given, assigned)
    run(resolved, config_name=config.stem if config else "", resume=resume == "auto", settings=user_settings)


def main() -> None:
    """Run the command line; a user error is one line on stderr, from the first process of each machine."""
    # A full disk under the log, a closed terminal or `| head` ends the output, never the training.
    sys.stderr = ResilientStream(sys.stderr)
    reports = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        run_command(app, report=reports)
    except SystemExit as end:
        if end.code == EXIT_USER_ERROR and not reports:
            time.sleep(_REPORT_S)
        leave(int(end.code or 0))


def leave(code: int) -> NoReturn:
    """End the process; one of several without the interpreter's tear-down.

    There a thread of torch's process group that requests the GIL is terminated inside C++ code, and aborts the process
    ("terminate called without an active exception"), which made torchrun report about one launch in twelve as failed.
    By now every file is closed, the tracker has finished and no rank waits for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
