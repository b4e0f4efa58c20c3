"""Options and arguments that several commands of `infer` share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Unknown(StrEnum):
    """What to do with characters that are not in the vocabulary."""

    ERROR = "error"
    SKIP = "skip"
    REPLACE = "replace"


class Split(StrEnum):
    """Part of a text, by the fractions that the model was trained with."""

    ALL = "all"
    TRAIN = "train"
    VAL = "val"
    TEST = "test"


ModelArgument = Annotated[
    Path | None, typer.Argument(metavar="[MODEL]", help="Model file (.onnx).  [default: the shipped model]")
]
ModelOption = Annotated[
    Path | None, typer.Option("-m", "--model", help="Model file (.onnx).  [default: the shipped model]")
]
UnknownOption = Annotated[
    Unknown, typer.Option(help="Characters not in the vocabulary: list and refuse, drop, or replace them.")
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
