"""Options of a text, and what `train.evaluate` and `train.export` measure on: the run's own text, or a given one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from charrnn.config import DataConfig, load_config

# These select a text's files and how they are read: they don't apply to another text.
_OF_A_TEXT = ("include", "exclude", "text_field", "encoding")

Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Files to take from a folder, glob or zip of --data, such as '*.txt'; repeatable.",
        show_default="all",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Files and folders of --data to leave out; repeatable.", show_default="none"),
]
TextField = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD", help="Field of .jsonl, .parquet and hf: records that holds the text.", show_default="text"
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Codec of the files; auto = UTF-8, or UTF-16 or 32 by byte order mark.",
        show_default="auto",
    ),
]


@dataclass(frozen=True)
class GivenText:
    """What the user named. data: file, folder or name; None = the run's own. The rest as in config; None = unset."""

    data: str | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    text_field: str | None = None
    encoding: str | None = None

    def config(self, recorded: Mapping[str, Any], **changes: Any) -> DataConfig:
        """The data section of a run's config for this text.

        Args:
            recorded: The run's own section.
            changes: Fields to set besides.

        Raises: ConfigError.
        """
        fields = {name: recorded[name] for name in DataConfig.model_fields.keys() & recorded.keys()}
        if not fields.get("cache_dir"):  # a model file and the shipped base name no folders
            fields.pop("cache_dir", None)
        if self.data:
            fields = {name: value for name, value in fields.items() if name not in _OF_A_TEXT} | {"source": self.data}
        fields |= {name: value for name in _OF_A_TEXT if (value := getattr(self, name)) is not None} | changes
        return load_config(None, {f"data.{name}": value for name, value in fields.items()}).data
