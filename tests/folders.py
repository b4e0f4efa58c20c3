"""Looking into folders that a test wrote."""

from pathlib import Path

from charrnn.io import MARKER


def names_in(folder: Path | str) -> list[str]:
    """The names in a folder, hidden ones too but for charrnn's own marker, sorted."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name != MARKER)
