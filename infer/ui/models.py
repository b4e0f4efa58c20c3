"""The models that the page offers, by name, and a cache of the loaded ones."""

import os
from functools import lru_cache
from pathlib import Path

from charrnn.errors import ConfigError, ModelFileError
from infer import sandbox
from infer.engine import Engine
from infer.model_file.loader import DEFAULT_MODELS, default_model

_MAX_LOADED = 4
_FOLDER = Path("checkpoints")


class Models:
    """The model files to choose from, each named by its path below the folder.

    Args:
        model: The first one; None is the shipped model.
        folder: Its *.onnx files, at any depth, can be chosen as well; None is `checkpoints` in the current folder.

    Raises:
        ConfigError: The folder is not one.
        ModelFileError: There is no shipped model.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, folder: Path | None = None) -> None:
        # Unlike Path's, os.path's tests answer False for a name that the system refuses.
        if folder is not None and not os.path.isdir(folder):  # noqa: PTH112
            raise ConfigError(f"{folder} is not a folder; name one that holds .onnx files")
        self._model = default_model() if model is None else Path(model)
        self._folder = _FOLDER if folder is None else folder
        self._load = lru_cache(_MAX_LOADED)(lambda path, _modified: _open(path))

    @property
    def first(self) -> str:
        """The name of the model that the page begins with."""
        return self._name(self._model)

    def names(self) -> list[str]:
        """List every model's name, the first one's at the front; the folder is read anew at each call."""
        found = sorted(self._name(path) for path in self._folder.rglob("*.onnx"))
        return [self.first, *(name for name in found if name != self.first)]

    def engine(self, name: str) -> Engine:
        """Return the model of that name, reloaded if its file has changed. Raises: ModelFileError."""
        if name not in self.names():
            raise ModelFileError(f"there is no model {name!r} any more; reload the page for the current list")
        path = self._model if name == self.first else self._folder / name
        modified = path.stat().st_mtime_ns if os.path.isfile(path) else 0  # noqa: PTH113
        return self._load(path, modified)

    def _name(self, path: Path) -> str:
        # The file itself is not resolved: a symbolic link keeps its own name.
        folder, path = self._folder.resolve(), path.parent.resolve() / path.name
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
        return str(path) if os.path.exists(folder / path.name) else path.name  # noqa: PTH110


def _open(path: Path) -> Engine:
    """Load a model file, after a trial in a child process unless it is the shipped one. Raises: ModelFileError."""
    if path not in DEFAULT_MODELS:
        sandbox.try_file(path)
    return Engine(path)
