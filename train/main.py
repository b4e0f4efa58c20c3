"""The entry of `accelerate launch train/main.py`: options -> config -> Trainer -> model.onnx."""

import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from charrnn.config import UNSIZED, RunConfig, load_config
from charrnn.data.download import without_credentials
from charrnn.errors import EXIT_DONE, EXIT_USER_FAULT, CharRNNError, user_error
from train.command_line import LastingStream

# torchrun ends all processes once one has failed: the one that tells of a fault all have met must come first.
_TIME_TO_TELL_S = 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Cell(StrEnum):
    """Recurrent cells, as --rnn names them."""

    GRU = "GRU"
    LSTM = "LSTM"


class Resume(StrEnum):
    """Whether the run folder's newest checkpoint is gone on from."""

    auto = "auto"
    never = "never"


class TrackerName(StrEnum):
    """Trackers, as --tracker names them."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    none = "none"


def _option(key: str, help_text: str, **extra: Any) -> Any:
    """An option for a config field; its default is the config's own, so that there is one."""
    section, field = key.split(".")
    default = getattr(getattr(RunConfig(), section), field)
    return typer.Option(help=help_text, show_default=str(default) or "none", **extra)


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
            "Text to learn: a file, folder, glob, URL, hf:NAME, - for standard input, or a corpus name "
            "(shakespeare, tinyshakespeare, enwik8, text8, novels, python). See docs/data.md.",
            metavar="PATH|NAME|URL|-",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files to take from a folder, glob or zip, such as '*.txt'; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files and folders to leave out of those; repeatable."),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD", help="Field of .jsonl, .parquet and hf: records that holds the text.", show_default="text"
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        _option(
            "data.vocab",
            "Symbols: chars of the text, bytes, a vocabulary FILE, or keep, which refuses characters that the model of "
            "--init-from does not know.",
            metavar="chars|bytes|FILE|keep",
        ),
    ] = None,
    rnn: Annotated[
        Cell | None, _option("model.rnn", "Recurrent cell.", case_sensitive=False, metavar="GRU|LSTM")
    ] = None,
    epochs: Annotated[
        float | None, _option("train.epochs", "Passes over the training split; 0 = no such limit.")
    ] = None,
    max_steps: Annotated[int | None, _option("train.max_steps", "Updates; 0 = no such limit.")] = None,
    time_limit: Annotated[
        str | None, _option("train.time_limit", "Wall-clock budget, such as 90s, 2m, 1h30m.", metavar="DURATION")
    ] = None,
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Run folder.", show_default="checkpoints/[<config>-]<corpus>"),
    ] = None,
    seed: Annotated[int | None, _option("train.seed", "Start of every random choice.")] = None,
    resume: Annotated[
        Resume, typer.Option(help="auto: go on from the run folder's newest checkpoint. never: refuse if it has one.")
    ] = Resume.auto,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="base|none|CKPT",
            help="Weights to fine-tune: the shipped base model, none, or a run or checkpoint.",
            show_default="base where it helps; none with --config",
        ),
    ] = None,
    tracker: Annotated[
        TrackerName | None, _option("tracking.tracker", "Where figures go besides metrics.jsonl.")
    ] = None,
    data_mirror: Annotated[
        str | None,
        _option(
            "data.mirror",
            "Folder or URL looked at before the public ones, as the environment's CHARRNN_DATA_MIRROR.",
            metavar="DIR",
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        _option("data.encoding", "Codec of the text; auto: UTF-8, or UTF-16 or 32 by byte order mark.", metavar="NAME"),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set any field of configs/plain.yaml; repeatable."),
    ] = None,
) -> None:
    """Train a character-level GRU or LSTM on a text, and export the best checkpoint as one ONNX file.

    Without --config, network and schedule are sized to the text, the machine's speed and --time-limit; every option
    given here is kept. The defaults shown are those of configs/plain.yaml. The same command again resumes a run that
    was cut off.
    """
    options = {
        "data.source": data,
        "data.include": include or None,
        "data.exclude": exclude or None,
        "data.text_field": text_field,
        "data.vocab": vocab,
        "model.rnn": rnn and rnn.value,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.time_limit": time_limit,
        "train.run_dir": run_dir,
        "train.seed": seed,
        "train.init_from": init_from,
        "tracking.tracker": tracker and tracker.value,
        "data.mirror": data_mirror,
        "data.encoding": encoding,
    }
    given = {key: value for key, value in options.items() if value is not None}
    assigned = tuple(assignments or ())
    sys.argv[1:] = map(without_credentials, sys.argv[1:])  # W&B records them
    settings = load_config(config, {**({} if config else UNSIZED), **given}, assigned)
    # torch takes a second to import: after the options are known to be right.
    from train.run import run
    from train.sizing import Chosen

    chosen = None if config else Chosen(given, assigned)
    run(settings, config_name=config.stem if config else "", resume=resume is Resume.auto, chosen=chosen)


def main() -> None:
    """Runs the command line; a user's fault is one line on stderr, from the first process of each machine."""
    # A full disk under the log, a closed terminal or `| head` ends what is shown, and never the training.
    sys.stderr = LastingStream(sys.stderr)
    try:
        app()
    except (CharRNNError, OSError, MemoryError) as caught:
        error = user_error(caught)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        elif error.exit_code == EXIT_USER_FAULT:
            time.sleep(_TIME_TO_TELL_S)
        leave(error.exit_code)
    except SystemExit as end:
        if not end.code:
            leave(EXIT_DONE)
        raise


def leave(code: int) -> NoReturn:
    """Ends the process; one of several without the interpreter's tear-down.

    There a thread of torch's process group that asks for the interpreter's lock is ended by force inside C++ code, and
    aborts the process ("terminate called without an active exception"): about one launch in twelve was then called
    failed by torchrun. By now every file is closed, the tracker has finished and no rank waits for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
