"""Folders that a test wrote: their content, and the sources in them."""

from pathlib import Path
from typing import Any

from charrnn.config import DataConfig
from charrnn.data.parts import Source
from charrnn.data.sources import find_source
from charrnn.io import MARKER


def find(source: str, *, binary: bool = False, cache_dir: str = "data", **fields: Any) -> Source:
    """The source that `--data` names, seen from the current folder."""
    return find_source(DataConfig(source=source, cache_dir=cache_dir, **fields), binary=binary)


def names_in(folder: Path | str) -> list[str]:
    """The names in a folder, hidden ones too but for charrnn's own marker, sorted."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name != MARKER)
