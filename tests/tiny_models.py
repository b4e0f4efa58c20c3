"""Small model files with random weights, for the tests of the inference half."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn.config import RunConfig
from charrnn.vocab import Vocab
from train.export.onnx_graph import build_onnx
from train.export.quantize import Precision
from train.export.weights import fold

CHARS = Vocab.of_chars("\n !ROMEabcdefghijklmnopqrstuvwxyz:")
GATES = {"GRU": 3, "LSTM": 4}

Weights = dict[str, NDArray[np.float32]]


def run_config(
    rnn: str = "GRU", num_layers: int = 2, hidden_dim: int = 24, embedding_dim: int = 16, layer_norm: bool = False
) -> RunConfig:
    model = {"rnn": rnn, "num_layers": num_layers, "hidden_dim": hidden_dim, "embedding_dim": embedding_dim}
    return RunConfig.model_validate({"model": model | {"layer_norm": layer_norm}})


def random_weights(config: RunConfig, vocab_size: int, seed: int = 0) -> Weights:
    """A CharRNN's state dict, large enough for states to matter and logits to differ."""
    m, gates = config.model, GATES[config.model.rnn]
    shapes = {"embedding.weight": (vocab_size, m.embedding_dim), "head.weight": (vocab_size, m.hidden_dim)}
    shapes |= {"head.bias": (vocab_size,)}
    for i in range(m.num_layers):
        shapes[f"rnn.weight_ih_l{i}"] = (gates * m.hidden_dim, m.hidden_dim if i else m.embedding_dim)
        shapes[f"rnn.weight_hh_l{i}"] = (gates * m.hidden_dim, m.hidden_dim)
        shapes[f"rnn.bias_ih_l{i}"] = shapes[f"rnn.bias_hh_l{i}"] = (gates * m.hidden_dim,)
        if m.layer_norm:
            shapes |= {f"norms.{i}.weight": (m.hidden_dim,), f"norms.{i}.bias": (m.hidden_dim,)}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def metadata(config: RunConfig, vocab: Vocab, changed: dict[str, str | None]) -> dict[str, str]:
    """What train.export writes, with some keys (given without their `charrnn.`) changed, or left out by None."""
    fields: dict[str, str | None] = {
        "format_version": "1",
        "vocab": vocab.to_json(),
        "config": config.model_dump_json(),
        "metrics": json.dumps(
            {"step": 1200, "chars": 5000000, "time_s": 61.5, "parameters": 12345, "hardware": "2 cores"}
            | {f"val/{p}/{u}": v for p in ("stream", "windows") for u, v in (("loss", 1.5), ("bpc", 2.164))}
        ),
        "corpus": json.dumps({"name": "tiny", "source": "tiny.txt", "num_chars": 1000}),
        "corpus_sha256": "0" * 64,
    }
    return {f"charrnn.{key}": value for key, value in (fields | changed).items() if value is not None}


def model_bytes(
    vocab: Vocab = CHARS,
    weights: Weights | None = None,
    changed: dict[str, str | None] | None = None,
    precision: Precision = "fp32",
    **sizes: Any,
) -> bytes:
    config = run_config(**sizes)
    weights = random_weights(config, len(vocab)) if weights is None else weights
    told = metadata(config, vocab, {"precision": precision} | (changed or {}))
    return build_onnx(config.model, vocab, fold(config.model, weights), told, precision).SerializeToString()


def write_model(path: Path, vocab: Vocab = CHARS, **kwargs: Any) -> Path:
    path.write_bytes(model_bytes(vocab, **kwargs))
    return path
