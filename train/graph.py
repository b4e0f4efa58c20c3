"""CharRNN's ONNX graph, written out operator by operator; docs/model-file.md specifies the result.

It is not traced: torch's dynamo exporter wrote silently wrong GRUs up to onnxscript 0.7.1 (pytorch#189225), and
defaults to external data. Letters: B batch, T seq_len, E, H, L, V as in docs/how-it-works.md.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from charrnn import __version__
from charrnn.config import ModelConfig
from charrnn.vocab import Vocab

# An old opset and file version run in more runtimes; GRU and LSTM have kept this form since opset 14.
_OPSET = 17
_IR_VERSION = 8

# Where torch's gates go in ONNX's order. torch: GRU r, z, n; LSTM i, f, g, o. ONNX: GRU z, r, h; LSTM i, o, f, c.
_GATE_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}

Weights = dict[str, NDArray[np.float32]]


def build_onnx(config: ModelConfig, vocab: Vocab, weights: Weights, metadata: dict[str, str]) -> onnx.ModelProto:
    """The model as an ONNX graph with every weight inside.

    weights: torch's state dict of a CharRNN, as numpy arrays. Inputs `ids` (B, T) int64, `h` and for LSTM `c`
    (L, B, H); outputs `logits` (B, T, V), `h_next`, `c_next`. B and T are dynamic.
    """
    states = ("h",) if config.rnn == "GRU" else ("h", "c")
    state_shape: list[str | int | None] = [config.num_layers, "B", config.hidden_dim]
    graph = helper.make_graph(
        _nodes(config, states),
        "charrnn",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "T"])]
        + [helper.make_tensor_value_info(s, TensorProto.FLOAT, state_shape) for s in states],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", len(vocab)])]
        + [helper.make_tensor_value_info(f"{s}_next", TensorProto.FLOAT, state_shape) for s in states],
        _initializers(config, weights),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    model.producer_name, model.producer_version = "charrnn", __version__
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def _nodes(config: ModelConfig, states: tuple[str, ...]) -> list[onnx.NodeProto]:
    """ids (B, T) -> (T, B) -> (T, B, E) -> L cells (T, B, H) -> (B, T, H) -> logits (B, T, V)."""
    node = helper.make_node
    nodes = [node("Transpose", ["ids"], ["ids_tb"], perm=[1, 0]), node("Gather", ["embedding", "ids_tb"], ["x0"])]
    for s in states:
        parts = [f"{s}{i}" for i in range(config.num_layers)]
        nodes.append(node("Split", [s, "one_each"], parts, axis=0))  # L of (1, B, H)
    # Multiply the reset gate after the recurrent product, as torch and cuDNN do.
    extra: dict[str, Any] = {"linear_before_reset": 1} if config.rnn == "GRU" else {}
    for i in range(config.num_layers):
        inputs = [f"x{i}", f"W{i}", f"R{i}", f"B{i}", "", *(f"{s}{i}" for s in states)]
        outputs = [f"y{i}", *(f"{s}{i}_next" for s in states)]
        nodes.append(node(config.rnn, inputs, outputs, hidden_size=config.hidden_dim, **extra))  # (T, 1, B, H)
        nodes.append(node("Squeeze", [f"y{i}", "axis_1"], [f"x{i + 1}"]))  # (T, B, H)
    for s in states:
        nodes.append(node("Concat", [f"{s}{i}_next" for i in range(config.num_layers)], [f"{s}_next"], axis=0))
    nodes.append(node("Transpose", [f"x{config.num_layers}"], ["hidden"], perm=[1, 0, 2]))
    nodes.append(node("MatMul", ["hidden", "head_weight"], ["products"]))
    nodes.append(node("Add", ["products", "head_bias"], ["logits"]))
    return nodes


def _initializers(config: ModelConfig, weights: Weights) -> list[onnx.TensorProto]:
    order = _GATE_ORDER[config.rnn]
    arrays: dict[str, NDArray[Any]] = {
        "embedding": weights["embedding.weight"],  # (V, E)
        "head_weight": weights["head.weight"].T,  # (H, V)
        "head_bias": weights["head.bias"],  # (V,)
        "one_each": np.ones(config.num_layers, np.int64),
        "axis_1": np.array([1], np.int64),
    }
    for i in range(config.num_layers):
        w, r, b_w, b_r = (
            _reorder(weights[f"rnn.{name}_l{i}"], order) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        arrays |= {f"W{i}": w[None], f"R{i}": r[None], f"B{i}": np.concatenate([b_w, b_r])[None]}
    return [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in arrays.items()]


def _reorder(stacked: NDArray[np.float32], order: tuple[int, ...]) -> NDArray[np.float32]:
    """Gates stacked along axis 0 in torch's order, (gates * H, ...), put into ONNX's order."""
    gates = np.split(stacked, len(order), axis=0)
    return np.concatenate([gates[g] for g in order], axis=0)
