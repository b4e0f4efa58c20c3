"""Opening a model file: finding it, running onnxruntime's checks on it, then ours. docs/model-file.md is the format.

Letters: B batch, T characters read, N characters drawn, L num_layers, H hidden_dim, V vocabulary size.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from charrnn.errors import ConfigError, ModelFileError, VocabError
from charrnn.vocab import Vocab
from infer.model_file import session as limits
from infer.model_file import validator as onnx_scan
from infer.model_file.protobuf import DamagedError, UnsafeError

FORMAT_VERSION = 3
MAX_THREADS = 256
_REQUIRED = ("charrnn.vocab", "charrnn.config")
# Where the shipped model lies: inside an installed wheel, and in the checkout behind an editable install.
DEFAULT_MODELS = (
    Path(__file__).resolve().parents[1] / "models" / "shakespeare.onnx",
    Path(__file__).resolve().parents[2] / "checkpoints" / "shakespeare.onnx",
)

_FATAL_ONLY = 4
_STATES = {"GRU": ("h",), "LSTM": ("h", "c")}
# What a file takes besides, from version 2 on, to draw characters by itself. They have defaults: no character.
_DRAWING = {"uniforms": ("tensor(double)", (None, None))} | {
    name: (kind, ())
    for name, kind in (
        ("temperature", "tensor(double)"),
        ("top_k", "tensor(int64)"),
        ("top_p", "tensor(double)"),
        ("min_p", "tensor(double)"),
    )
}
# A tensor's name -> its element type and shape; None is a dimension of any size.
_Signature = dict[str, tuple[str, tuple[int | None, ...]]]


@dataclass(frozen=True)
class ModelFile:
    """A model file whose every part has been checked.

    config: the whole run's, by section. metrics, corpus: what training recorded; {} when the file does not say.
    states: the names of the state's parts, ("h",) or ("h", "c"); num_layers L, hidden_dim H. draws: whether the graph
    draws characters by itself, as from format version 2 on.
    """

    path: Path
    session: Any
    metadata: dict[str, str]
    vocab: Vocab
    config: dict[str, Any]
    metrics: dict[str, Any]
    corpus: dict[str, Any]
    states: tuple[str, ...]
    num_layers: int
    hidden_dim: int
    draws: bool


def default_model() -> Path:
    """The shipped model. Raises: ModelFileError when this installation has none."""
    for path in DEFAULT_MODELS:
        if path.is_file():
            return path
    raise ModelFileError(
        "this installation has no default model (checkpoints/shakespeare.onnx is missing); name a model file with -m, "
        "or train one with: accelerate launch train/main.py"
    )


def open_model(path: Path, threads: int) -> ModelFile:
    """Loads and checks the model file at `path`. threads: CPU threads an operator may use.

    Raises: ModelFileError when the file is missing, damaged, not charrnn's or too new; ConfigError for `threads`.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads must lie between 1 and {MAX_THREADS}, not {threads}")
    data = _read(path)
    try:
        found = onnx_scan.outline(data)
        _check_version(path, found.metadata)
        missing = [key for key in _REQUIRED if key not in found.metadata]
        if missing:
            raise ModelFileError(f"{path}: its metadata lacks {', '.join(missing)}; export it again")
        vocab = _vocab(path, found.metadata["charrnn.vocab"])
        config = _json_object(path, found.metadata, "charrnn.config")
        rnn, num_layers, hidden_dim = _sizes(path, config, found.size)
        sizes = onnx_scan.Sizes(rnn, len(vocab), hidden_dim, num_layers, vocab.document_end_id)
        onnx_scan.check_graph(found, sizes)
    except DamagedError as error:
        raise _not_a_model(path, str(error)) from None
    except UnsafeError as error:
        raise ModelFileError(
            f"{path} is not opened: {brief(error)}, as no file of format version {FORMAT_VERSION} does; export it "
            "again, or get it from a source that you trust"
        ) from None
    metadata = found.metadata
    session = _open_session(path, data, threads)
    draws = int(metadata["charrnn.format_version"]) >= 2
    _check_signature(path, session, _STATES[rnn], num_layers, hidden_dim, len(vocab), draws)
    _try_out(path, session, _STATES[rnn], num_layers, hidden_dim, len(vocab), draws)
    return ModelFile(
        path,
        session,
        metadata,
        vocab,
        config,
        _json_object(path, metadata, "charrnn.metrics"),
        _json_object(path, metadata, "charrnn.corpus"),
        _STATES[rnn],
        num_layers,
        hidden_dim,
        draws,
    )


def _read(path: Path) -> bytes:
    """The file's bytes: those that are checked are those that onnxruntime gets. Raises: ModelFileError."""
    try:
        # Opening a pipe would wait for its writer.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelFileError(f"{path} is a pipe or a device, not a model file; write it to a file first")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not 0 < size <= onnx_scan.MAX_FILE_BYTES:
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


def brief(text: object) -> str:
    """What a file or onnxruntime says, fit for a one-line message."""
    return " ".join(str(text).split())[:200]


def _open_session(path: Path, data: bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    # What goes wrong is raised too; onnxruntime's own lines on stderr would only repeat it.
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    try:
        return limits.open_session(data, options)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise _not_a_model(path, str(error)) from None


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    text = metadata.get("charrnn.format_version")
    if text is None:
        raise ModelFileError(
            f"{path} is an ONNX model but not charrnn's (its metadata has no charrnn.format_version); "
            "export one with: python -m train.export RUN"
        )
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise ModelFileError(
            f"{path}: charrnn.format_version is {brief(repr(text))}, not a number from 1 on; export it again"
        )
    if int(text) > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {text}, and this charrnn reads up to {FORMAT_VERSION}; upgrade charrnn"
        )


def _json_object(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        fields = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {key} is not JSON ({brief(error)}); export it again") from None
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path}: {key} must be a JSON object, not {type(fields).__name__}; export it again")
    if _has_half_characters(json.dumps(fields, ensure_ascii=False)):
        raise ModelFileError(f"{path}: {key} has a lone surrogate, half of a character; export it again")
    return fields


def _vocab(path: Path, text: str) -> Vocab:
    try:
        vocab = Vocab.from_json(text)
    except VocabError as error:
        raise ModelFileError(f"{path}: charrnn.vocab is {brief(error)}") from None
    if _has_half_characters("".join(vocab.symbols)):
        raise ModelFileError(f"{path}: charrnn.vocab has a lone surrogate, half of a character; export it again")
    return vocab


def _has_half_characters(text: str) -> bool:
    """Whether it holds what JSON can spell and no terminal or file takes."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _sizes(path: Path, config: dict[str, Any], file_bytes: int) -> tuple[str, int, int]:
    """(rnn, L, H) of the config's model section."""
    model = config.get("model")
    if not isinstance(model, dict):
        raise ModelFileError(f"{path}: charrnn.config has no model section; export it again")
    rnn = model.get("rnn")
    if not isinstance(rnn, str) or rnn not in _STATES:
        raise ModelFileError(
            f"{path}: charrnn.config says rnn {brief(repr(rnn))}, not {' or '.join(_STATES)}; export it again"
        )
    for name in ("num_layers", "hidden_dim"):
        if type(model.get(name)) is not int or model[name] < 1:
            raise ModelFileError(
                f"{path}: charrnn.config says {name} {brief(repr(model.get(name)))}, not a number from 1 on; export "
                "it again"
            )
    num_layers, hidden_dim = model["num_layers"], model["hidden_dim"]
    # In the fewest bits a layer takes more than a byte for each part of its state.
    if num_layers * hidden_dim > file_bytes:
        raise ModelFileError(
            f"{path}: charrnn.config says num_layers {brief(num_layers)} and hidden_dim {brief(hidden_dim)}, more "
            f"than {file_bytes} bytes can hold; export it again"
        )
    return rnn, num_layers, hidden_dim


def _check_signature(
    path: Path, session: Any, states: tuple[str, ...], num_layers: int, hidden_dim: int, vocab_size: int, draws: bool
) -> None:
    """The graph takes and gives what its metadata promises."""
    state = ("tensor(float)", (num_layers, None, hidden_dim))
    inputs: _Signature = {"ids": ("tensor(int64)", (None, None))} | dict.fromkeys(states, state)
    outputs: _Signature = {"logits": ("tensor(float)", (None, None, vocab_size))}
    outputs |= dict.fromkeys((f"{s}_next" for s in states), state)
    if draws:
        outputs["drawn"] = ("tensor(int64)", (None, None))
    for kind, promised, nodes in (
        ("input", inputs, session.get_inputs()),
        ("optional input", _DRAWING if draws else {}, session.get_overridable_initializers()),
        ("output", outputs, session.get_outputs()),
    ):
        found: _Signature = {n.name: (n.type, tuple(d if isinstance(d, int) else None for d in n.shape)) for n in nodes}
        for name in promised | found:
            if promised.get(name) != found.get(name):
                raise ModelFileError(
                    f"{path}: {kind} {brief(name)} is {_spell(found.get(name))} in the graph but "
                    f"{_spell(promised.get(name))} by its metadata; export it again"
                )


def _try_out(
    path: Path, session: Any, states: tuple[str, ...], num_layers: int, hidden_dim: int, vocab_size: int, draws: bool
) -> None:
    """Characters read and drawn, in two rows: weights that do not fit together show now and not amid a text."""
    state = np.zeros((num_layers, 2, hidden_dim), np.float32)
    feeds: dict[str, Any] = {"ids": np.array([[0, vocab_size - 1]] * 2), **dict.fromkeys(states, state)}
    drawing = feeds | {"ids": np.zeros((2, 1), np.int64), "uniforms": np.full((2, 4), 0.5), "top_p": np.array(0.9)}
    names = ["logits", *(f"{name}_next" for name in states)]
    try:
        found = limits.run_briefly(session, names, feeds)
        # Of a model that gives NaN, nothing can be drawn; whoever draws is told so.
        if draws and all(np.isfinite(part).all() for part in found):
            found += limits.run_briefly(session, ["drawn"], drawing)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ModelFileError(f"{path}: its graph does not run ({brief(limits.told(error))}); export it again") from None
    shapes = [part.shape for part in found]
    expected = [(2, 2, vocab_size), *[state.shape] * len(states), (2, 4)][: len(shapes)]
    if shapes != expected:
        raise ModelFileError(f"{path}: its graph gives the shapes {shapes}, not {expected}; export it again")


def _spell(tensor: tuple[str, tuple[int | None, ...]] | None) -> str:
    if tensor is None:
        return "absent"
    kind, shape = tensor
    return f"{kind} ({', '.join('any' if d is None else str(d) for d in shape)})"
