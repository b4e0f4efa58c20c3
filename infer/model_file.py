"""Opening a model file: finding it, running onnxruntime's checks on it, then ours. docs/model-file.md is the format.

Letters: B batch, T characters read, N characters drawn, L num_layers, H hidden_dim, V vocabulary size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from charrnn.errors import ConfigError, ModelFileError, VocabError
from charrnn.vocab import Vocab

FORMAT_VERSION = 2
MAX_THREADS = 256
_REQUIRED = ("charrnn.vocab", "charrnn.config")
# Where the shipped model lies: inside an installed wheel, and in the checkout behind an editable install.
DEFAULT_MODELS = (
    Path(__file__).resolve().parent / "models" / "shakespeare.onnx",
    Path(__file__).resolve().parent.parent / "checkpoints" / "shakespeare.onnx",
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
    session = _open_session(path, threads)
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    _check_version(path, metadata)
    missing = [key for key in _REQUIRED if key not in metadata]
    if missing:
        raise ModelFileError(f"{path}: its metadata lacks {', '.join(missing)}; export it again")
    try:
        vocab = Vocab.from_json(metadata["charrnn.vocab"])
    except VocabError as error:
        raise ModelFileError(f"{path}: charrnn.vocab is {error}") from None
    config = _json_object(path, metadata, "charrnn.config")
    rnn, num_layers, hidden_dim = _sizes(path, config)
    draws = int(metadata["charrnn.format_version"]) >= 2
    _check_signature(path, session, _STATES[rnn], num_layers, hidden_dim, len(vocab), draws)
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


def _open_session(path: Path, threads: int) -> Any:
    try:
        # Opening a pipe would wait for its writer.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelFileError(f"{path} is a pipe or a device, not a model file; write it to a file first")
        with path.open("rb"):
            pass
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
    options = onnxruntime.SessionOptions()
    # What goes wrong is raised too; onnxruntime's own lines on stderr would only repeat it.
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        reason = " ".join(str(error).split())[:200]
        raise ModelFileError(
            f"{path} is not an ONNX model that onnxruntime {onnxruntime.__version__} can load: it is damaged, cut "
            f"short, or another kind of file ({reason})"
        ) from None


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    text = metadata.get("charrnn.format_version")
    if text is None:
        raise ModelFileError(
            f"{path} is an ONNX model but not charrnn's (its metadata has no charrnn.format_version); "
            "export one with: python -m train.export RUN"
        )
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ModelFileError(f"{path}: charrnn.format_version is {text!r}, not a number from 1 on; export it again")
    if int(text) > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {text}, and this charrnn reads up to {FORMAT_VERSION}; upgrade charrnn"
        )


def _json_object(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        fields = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {key} is not JSON ({error}); export it again") from None
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path}: {key} must be a JSON object, not {type(fields).__name__}; export it again")
    return fields


def _sizes(path: Path, config: dict[str, Any]) -> tuple[str, int, int]:
    """(rnn, L, H) of the config's model section."""
    model = config.get("model")
    if not isinstance(model, dict):
        raise ModelFileError(f"{path}: charrnn.config has no model section; export it again")
    rnn = model.get("rnn")
    if not isinstance(rnn, str) or rnn not in _STATES:
        raise ModelFileError(f"{path}: charrnn.config says rnn {rnn!r}, not {' or '.join(_STATES)}; export it again")
    for name in ("num_layers", "hidden_dim"):
        if type(model.get(name)) is not int or model[name] < 1:
            raise ModelFileError(f"{path}: charrnn.config says {name} {model.get(name)!r}, not a number from 1 on")
    return rnn, model["num_layers"], model["hidden_dim"]


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
                    f"{path}: {kind} {name} is {_spell(found.get(name))} in the graph but {_spell(promised.get(name))} "
                    "by its metadata; export it again"
                )


def _spell(tensor: tuple[str, tuple[int | None, ...]] | None) -> str:
    if tensor is None:
        return "absent"
    kind, shape = tensor
    return f"{kind} ({', '.join('any' if d is None else str(d) for d in shape)})"
