"""Looking into folders that a test wrote."""

from pathlib import Path


def names_in(folder: Path | str) -> list[str]:
    """The names in a folder, hidden ones too, sorted."""
    return sorted(path.name for path in Path(folder).iterdir())
