"""The weights of a model file, for writing it again in another precision or format version."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from charrnn.config import ModelConfig
from charrnn.errors import ExportError
from train.export.onnx_graph import Weights, matrices_in, matrices_of, reordered

# Where torch's gates lie in ONNX's own GRU and LSTM, which format version 1 used. ONNX: z, r, h and i, o, f, c.
_GATES_IN_FORMAT_1 = {"GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}


def matrices_of_file(path: Path, config: ModelConfig, metadata: dict[str, str]) -> Weights:
    """`train.export.onnx_graph.matrices_of` a float32 model file, which infer has checked.

    Raises: ExportError for a file whose weights are already rounded.
    """
    model = onnx.load(path, load_external_data=False)
    matrices = matrices_in(model)
    if matrices is None and metadata["charrnn.format_version"] == "1":
        matrices = matrices_of(config, _weights_of_format_1(config, model))
    if matrices is None:
        precision = metadata.get("charrnn.precision", "fp32")
        raise ExportError(
            f"{path} is {precision}: its weights cannot be had back whole; export from the run, a checkpoint or a "
            "float32 model file"
        )
    return matrices


def _weights_of_format_1(config: ModelConfig, model: onnx.ModelProto) -> Weights:
    """torch's state dict. W, R, B: (1, G, E or H), (1, G, H), (1, 2G), in ONNX's order of gates."""
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = {
        "embedding.weight": found["embedding"],
        "head.weight": found["head_weight"].T,
        "head.bias": found["head_bias"],
    }
    order = _GATES_IN_FORMAT_1[config.rnn]
    for i in range(config.num_layers):
        biases = np.split(found[f"B{i}"][0], 2)
        parts = {"weight_ih": found[f"W{i}"][0], "weight_hh": found[f"R{i}"][0]}
        parts |= {"bias_ih": biases[0], "bias_hh": biases[1]}
        weights |= {f"rnn.{name}_l{i}": reordered(part, order) for name, part in parts.items()}
    return weights


def is_model_file(path: Path) -> bool:
    """Whether a path names a model file, and not a run or a checkpoint, which are folders."""
    return path.suffix == ".onnx" or path.is_file()
