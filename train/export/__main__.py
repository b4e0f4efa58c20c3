"""`python -m train.export RUN|CHECKPOINT|MODEL.onnx [--out FILE] [--precision int8]`."""

from pathlib import Path
from typing import Annotated

import typer

from charrnn.cli import run_command
from charrnn.errors import ConfigError
from charrnn.log import configure_logging
from train.export.exporter import export
from train.export.quantize import Precision
from train.given_text import Encoding, Exclude, GivenText, Include, TextField


def command(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|CHECKPOINT|MODEL", help="A run folder (its best/), a checkpoint or a model file."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write.", show_default="model.onnx or model-int8.onnx in the run folder"),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the weights.")] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            help="The training text (file or name): measure the file's validation loss on it.",
            show_default="not measured",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    text_field: TextField = None,
    encoding: Encoding = None,
) -> None:
    """Write a checkpoint or a model file as one ONNX file and check it against the exact model."""
    text = GivenText(data, include or None, exclude or None, text_field, encoding)
    if not data and text != GivenText(data):
        raise ConfigError("--include, --exclude, --text-field and --encoding are of the text; name it with --data")
    path, _, line = export(source, out, precision, text if data else None)
    typer.echo(f"{path}  {line}")


if __name__ == "__main__":
    configure_logging()
    run_command(lambda: typer.run(command))
