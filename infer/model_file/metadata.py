"""Reading a model file's metadata, which anyone may have written: every error is one line that names the file."""

import json
from pathlib import Path
from typing import Any

from charrnn.errors import ModelFileError, VocabError
from charrnn.vocab import Vocab
from infer.model_file.layout import STATES, Sizes

FORMAT_VERSION = 1


def brief(text: object) -> str:
    """Return a file's or onnxruntime's words, fit for a one-line message."""
    return " ".join(str(text).split())[:200]


def check_version(path: Path, metadata: dict[str, str]) -> None:
    """Refuse a file of another program or format version. Raises: ModelFileError."""
    text = metadata.get("charrnn.format_version")
    if text is None:
        raise ModelFileError(
            f"{path} is an ONNX model but not charrnn's (its metadata has no charrnn.format_version); "
            "export one with: python -m train.export RUN"
        )
    if text != str(FORMAT_VERSION):
        raise ModelFileError(
            f"{path} has format version {brief(repr(text))}, and this charrnn reads version {FORMAT_VERSION}; upgrade "
            "charrnn, or export the file again"
        )


def read_json(path: Path, metadata: dict[str, str], name: str) -> dict[str, Any]:
    """Return the JSON object under `charrnn.NAME`, {} if there is none. Raises: ModelFileError."""
    key = f"charrnn.{name}"
    try:
        fields = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {key} is not JSON ({brief(error)}); export it again") from None
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path}: {key} must be a JSON object, not {type(fields).__name__}; export it again")
    _check_surrogates(path, key, json.dumps(fields, ensure_ascii=False))
    return fields


def read_vocab(path: Path, text: str) -> Vocab:
    """Return the vocabulary. Raises: ModelFileError."""
    try:
        vocab = Vocab.from_json(text)
    except VocabError as error:
        raise ModelFileError(f"{path}: charrnn.vocab is {brief(error)}") from None
    _check_surrogates(path, "charrnn.vocab", "".join(vocab.symbols))
    return vocab


def _check_surrogates(path: Path, key: str, text: str) -> None:
    """Refuse what JSON can spell and no terminal or file takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ModelFileError(f"{path}: {key} has a lone surrogate, half of a character; export it again")


def read_sizes(path: Path, config: dict[str, Any], vocab: Vocab, file_bytes: int) -> Sizes:
    """Return the sizes by the config's model section. Raises: ModelFileError."""
    model = config.get("model")
    if not isinstance(model, dict):
        raise ModelFileError(f"{path}: charrnn.config has no model section; export it again")
    rnn: Any = model.get("rnn")
    num_layers: Any = model.get("num_layers")
    hidden_dim: Any = model.get("hidden_dim")
    if not isinstance(rnn, str) or rnn not in STATES:
        raise ModelFileError(
            f"{path}: charrnn.config has rnn {brief(repr(rnn))}, not {' or '.join(STATES)}; export it again"
        )
    for name, value in (("num_layers", num_layers), ("hidden_dim", hidden_dim)):
        if type(value) is not int or value < 1:
            raise ModelFileError(
                f"{path}: charrnn.config has {name} {brief(repr(value))}, not a number from 1 on; export it again"
            )
    # In the fewest bits a layer takes more than a byte for each part of its state.
    if num_layers * hidden_dim > file_bytes:
        raise ModelFileError(
            f"{path}: charrnn.config has num_layers {brief(num_layers)} and hidden_dim {brief(hidden_dim)}, more "
            f"than {file_bytes} bytes can hold; export it again"
        )
    return Sizes(rnn, len(vocab), hidden_dim, num_layers, vocab.document_end_id)
