"""Opening a model file: reading it, validating it, and the onnxruntime session. docs/model-file.md is the format.

Letters: B batch, T characters read, N characters generated, L num_layers, H hidden_dim, V vocabulary size.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from charrnn.errors import ConfigError, ModelFileError
from charrnn.vocab import Vocab
from infer.model_file import session as sessions
from infer.model_file import validator
from infer.model_file.layout import Sizes
from infer.model_file.metadata import FORMAT_VERSION, brief, check_version, read_json, read_sizes, read_vocab
from infer.model_file.protobuf import DamagedError, UnsafeError

MAX_THREADS = 256
_REQUIRED = ("charrnn.vocab", "charrnn.config")
# Where the shipped model lies: inside an installed wheel, and in the checkout behind an editable install.
DEFAULT_MODELS = (
    Path(__file__).resolve().parents[1] / "models" / "shakespeare.onnx",
    Path(__file__).resolve().parents[2] / "checkpoints" / "shakespeare.onnx",
)


@dataclass(eq=False, repr=False)  # an engine, which is one, can be a key, and prints no vocabulary
class ModelFile:
    """A model file whose every part has been checked.

    Attributes:
        path: Where it lies.
        session: Its onnxruntime session.
        metadata: As in the file.
        vocab: What it reads and writes.
        config: The settings of the run that made it, by section.
        metrics: What training measured; {} if the file has none.
        corpus: Name, source and length of the training text; {} if the file has none.
        sizes: The sizes of its network.
    """

    path: Path
    session: Any
    metadata: dict[str, str]
    vocab: Vocab
    config: dict[str, Any]
    metrics: dict[str, Any]
    corpus: dict[str, Any]
    sizes: Sizes


def default_model() -> Path:
    """Return the shipped model's path.

    Raises:
        ModelFileError: if this installation has none.
    """
    for path in DEFAULT_MODELS:
        if path.is_file():
            return path
    raise ModelFileError(
        "this installation has no default model (checkpoints/shakespeare.onnx is missing); name a model file with -m, "
        "or train one with: accelerate launch train/main.py"
    )


def open_model(path: Path, threads: int) -> ModelFile:
    """Load and check a model file.

    Args:
        path: The file.
        threads: CPU threads an operator may use.

    Raises:
        ModelFileError: if the file is missing, damaged, not charrnn's or too new.
        ConfigError: if `threads` is out of range.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads must lie between 1 and {MAX_THREADS}, not {threads}")
    data = _read(path)
    try:
        outline = validator.outline(data)
        metadata = outline.metadata
        check_version(path, metadata)
        missing = [key for key in _REQUIRED if key not in metadata]
        if missing:
            raise ModelFileError(f"{path}: its metadata lacks {', '.join(missing)}; export it again")
        vocab = read_vocab(path, metadata["charrnn.vocab"])
        config, metrics, corpus = (read_json(path, metadata, key) for key in ("config", "metrics", "corpus"))
        sizes = read_sizes(path, config, vocab, len(data))
        validator.check_graph(outline, sizes)
    except DamagedError as error:
        raise _not_a_model(path, str(error)) from None
    except UnsafeError as error:
        raise ModelFileError(
            f"{path} is not opened: {brief(error)}, as no file of format version {FORMAT_VERSION} does; export it "
            "again, or get it from a source that you trust"
        ) from None
    try:
        session = sessions.open_session(data, threads)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise _not_a_model(path, str(error)) from None
    file = ModelFile(path, session, metadata, vocab, config, metrics, corpus, sizes)
    _try_out(file)
    return file


def _read(path: Path) -> bytes:
    """Return the file's bytes: those that are checked are those that onnxruntime gets. Raises: ModelFileError."""
    try:
        # Opening a pipe would wait for its writer.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelFileError(f"{path} is a pipe or a device, not a model file; write it to a file first")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not 0 < size <= validator.MAX_FILE_BYTES:
                raise _not_a_model(path, f"it has {size} bytes")
            file.seek(0)
            return file.read(size)
    except FileNotFoundError:
        raise ModelFileError(
            f"no model file {path}; leave the model out to use the shipped one, or train one with: "
            "accelerate launch train/main.py"
        ) from None
    except IsADirectoryError:
        inside = path / "model.onnx"
        remedy = f"use {inside}" if inside.is_file() else f"export it with: python -m train.export {path}"
        raise ModelFileError(f"{path} is a folder, not a model file; {remedy}") from None
    except OSError as error:
        raise ModelFileError(f"cannot read model file {path}: {error.strerror}") from None


def _not_a_model(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is not an ONNX model that onnxruntime {onnxruntime.__version__} can load: it is damaged, cut "
        f"short, or another kind of file ({brief(reason)})"
    )


def _try_out(file: ModelFile) -> None:
    """Read and generate some characters in two rows, so that weights, inputs or outputs that don't fit show now."""
    sizes = file.sizes
    state = np.zeros((sizes.num_layers, 2, sizes.hidden_dim), np.float32)
    feeds: dict[str, Any] = {
        "ids": np.array([[0, sizes.vocab_size - 1]] * 2),
        **dict.fromkeys(file.sizes.states, state),
    }
    ones = np.ones(2)
    sampling = {"temperature": ones, "top_k": np.array([0, 1]), "top_p": np.array([0.9, 1.0]), "min_p": 0 * ones}
    sampling["uniforms"] = np.full((2, 4), 0.5)
    names = ["logits", *(f"{name}_next" for name in file.sizes.states)]
    try:
        found = sessions.run_with_timeout(file.session, names, feeds)
        # A model whose logits are NaN is refused when it is sampled from.
        if all(np.isfinite(part).all() for part in found):
            feeds |= {"ids": np.zeros((2, 1), np.int64), **sampling}
            found += sessions.run_with_timeout(file.session, ["drawn"], feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        reason = brief(sessions.reason(error))
        raise ModelFileError(f"{file.path}: its graph does not run ({reason}); export it again") from None
    shapes = [part.shape for part in found]
    expected = [(2, 2, sizes.vocab_size), *[state.shape] * len(file.sizes.states), (2, 4)][: len(shapes)]
    if shapes != expected:
        raise ModelFileError(f"{file.path}: its graph gives the shapes {shapes}, not {expected}; export it again")
