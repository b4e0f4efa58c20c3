"""The models that the page offers, by name, and those that are loaded."""

import os
from functools import lru_cache
from pathlib import Path

from charrnn.errors import ConfigError, ModelFileError
from infer import child
from infer.engine import Engine
from infer.model_file.loader import DEFAULT_MODELS, default_model

# Loaded models kept in memory.
_MOST_LOADED = 4
_FOLDER = Path("checkpoints")


class Models:
    """The model files to choose from, each under a name that is a path below its folder.

    model: the first one; None is the shipped model. folder: its *.onnx files, at any depth, can be chosen as well; None
    is `checkpoints` below the current folder, if there is one.
    Raises: ConfigError for a folder that is none; ModelFileError when there is no shipped model.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, folder: Path | None = None) -> None:
        # Unlike Path's, these take a name that the system refuses for one that is not there.
        if folder is not None and not os.path.isdir(folder):  # noqa: PTH112
            raise ConfigError(f"{folder} is not a folder; name one that holds .onnx files")
        self._model = default_model() if model is None else Path(model)
        self._folder = _FOLDER if folder is None else folder
        self._load = lru_cache(_MOST_LOADED)(lambda path, _written: _opened(path))

    @property
    def first(self) -> str:
        """The name of the model that the page begins with."""
        return self._name(self._model)

    def names(self) -> list[str]:
        """Every model's name, the first one's at the front; files that appeared since the last call are among them."""
        found = sorted(self._name(path) for path in self._folder.rglob("*.onnx"))
        return [self.first, *(name for name in found if name != self.first)]

    def engine(self, name: str) -> Engine:
        """The model of that name, loaded anew only when its file has changed. Raises: ModelFileError."""
        if name not in self.names():
            raise ModelFileError(f"there is no model {name!r} any more; reload the page to see those there are")
        path = self._model if name == self.first else self._folder / name
        written = path.stat().st_mtime_ns if os.path.isfile(path) else 0  # noqa: PTH113
        return self._load(path, written)

    def _name(self, path: Path) -> str:
        # A link is called by its own name, wherever it leads.
        folder, path = self._folder.resolve(), path.parent.resolve() / path.name
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
        return str(path) if os.path.exists(folder / path.name) else path.name  # noqa: PTH110


def _opened(path: Path) -> Engine:
    """The model of a file, which unless we shipped it has been tried in another process. Raises: ModelFileError."""
    if path not in DEFAULT_MODELS:
        child.try_file(path)
    return Engine(path)
