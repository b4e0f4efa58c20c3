"""Model files of format version 1, which had ONNX's own GRU and LSTM and did not draw; infer still reads them."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_models import CHARS, metadata, random_weights, run_config

# An old opset and file version run in more runtimes; GRU and LSTM have kept this form since opset 14.
_OPSET = 17
_IR_VERSION = 8

# Where torch's gates go in ONNX's order. torch: GRU r, z, n; LSTM i, f, g, o. ONNX: GRU z, r, h; LSTM i, o, f, c.
_GATE_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def format_1(**sizes: Any) -> bytes:
    """A file with the weights that tiny_models.model_bytes gives the same sizes."""
    config = run_config(**sizes)
    m, weights = config.model, random_weights(config, len(CHARS))
    states = ("h",) if m.rnn == "GRU" else ("h", "c")
    state_shape: list[str | int | None] = [m.num_layers, "B", m.hidden_dim]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        _nodes(m, states),
        "charrnn",
        [tensor("ids", TensorProto.INT64, ["B", "T"])] + [tensor(s, TensorProto.FLOAT, state_shape) for s in states],
        [tensor("logits", TensorProto.FLOAT, ["B", "T", len(CHARS)])]
        + [tensor(f"{s}_next", TensorProto.FLOAT, state_shape) for s in states],
        _initializers(m, weights),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    helper.set_model_props(model, metadata(config, CHARS, {"format_version": "1"}))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _nodes(config, states) -> list[onnx.NodeProto]:
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


def _initializers(config, weights) -> list[onnx.TensorProto]:
    order = _GATE_ORDER[config.rnn]
    arrays: dict[str, np.ndarray] = {
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


def _reorder(stacked: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Gates stacked along axis 0 in torch's order, (gates * H, ...), put into ONNX's order."""
    gates = np.split(stacked, len(order), axis=0)
    return np.concatenate([gates[g] for g in order], axis=0)
