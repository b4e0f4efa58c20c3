"""From torch's state dict to the matrices of the exported graph: gates reordered, biases summed, LayerNorm folded in.

Letters: V, E, H, L as in docs/model-file.md; G is 3H for GRU and 4H for LSTM.
"""

import re
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from charrnn.config import ModelConfig

Weights = dict[str, NDArray[np.float32]]

# torch stacks gates GRU r, z, n; LSTM i, f, g, o. The graph has those of a sigmoid first: r, z, n; i, f, o, g.
_GATE_ORDER = {"GRU": (0, 1, 2), "LSTM": (0, 1, 3, 2)}
# For more symbols a table of embeddings already multiplied, (V, G), would be larger than the two matrices.
_TABLE_UP_TO = 512


def fold(config: ModelConfig, weights: Weights) -> Weights:
    """Return what the graph multiplies with and adds, in float32.

    Args:
        config: The network's shape.
        weights: torch's state dict of a CharRNN, as numpy arrays.

    Returns:
        `table` (V, G), the first layer's input for each symbol, or for a large vocabulary `embedding` (V, E) and
        `input0` (E, G); `input1` ... (H, G), `recurrent0` ... (H, G), `head` (H, V), each with a `_bias`. Behind a
        LayerNorm, `input1` ... and `head` have a `_shift` in place of the bias; see `_fold_norm`.
    """
    found: Weights = {}
    embedding = weights["embedding.weight"]  # (V, E)
    for i in range(config.num_layers):
        w, r, b_w, b_r = (
            _reordered(weights[f"rnn.{name}_l{i}"], _GATE_ORDER[config.rnn])
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        recurrent_bias = np.zeros_like(b_r)
        if config.rnn == "GRU":  # the reset gate multiplies the candidate's recurrent bias
            recurrent_bias[-config.hidden_dim :] = b_r[-config.hidden_dim :]
        bias = b_w + b_r - recurrent_bias
        if i == 0 and len(embedding) <= _TABLE_UP_TO:
            found["table"] = (embedding.astype(np.float64) @ w.T + bias).astype(np.float32)
        else:
            found |= _fold_norm(f"input{i}", w.T, bias, weights, i - 1)
        found |= {f"recurrent{i}": r.T, f"recurrent{i}_bias": recurrent_bias}
    if "table" not in found:
        found["embedding"] = embedding
    return found | _fold_norm("head", weights["head.weight"].T, weights["head.bias"], weights, config.num_layers - 1)


def _fold_norm(
    name: str, matrix: NDArray[np.float32], bias: NDArray[np.float32], weights: Weights, layer: int
) -> Weights:
    """Fold the LayerNorm of `layer`, if it has one, into the matrix (H, N) and bias (N,) that follow it.

    LayerNorm(h) W + bias = ((h - mean h) / s * gain + offset) W + bias = (h W') / s + shift. The columns of
    W' = gain W less their means add up to 0, which takes the mean of h away; shift = offset W + bias. What is
    multiplied stays h itself, between -1 and 1.
    """
    gain = weights.get(f"norms.{layer}.weight")
    if gain is None:
        return {name: matrix, f"{name}_bias": bias}
    wide = gain[:, None].astype(np.float64) * matrix
    shift = weights[f"norms.{layer}.bias"].astype(np.float64) @ matrix + bias
    return {name: (wide - wide.mean(axis=0)).astype(np.float32), f"{name}_shift": shift.astype(np.float32)}


def _reordered(stacked: NDArray[np.float32], order: Sequence[int]) -> NDArray[np.float32]:
    """Reorder gates stacked along axis 0, (G, ...)."""
    gates = np.split(stacked, len(order), axis=0)
    return np.concatenate([gates[g] for g in order], axis=0)


def weights_in(model: onnx.ModelProto) -> Weights | None:
    """Return `fold`'s weights from a float32 model file; None if the file's weights are quantized."""
    found = {
        t.name: numpy_helper.to_array(t)
        for t in model.graph.initializer
        if re.sub("_(bias|shift)$", "", t.name).rstrip("0123456789")
        in ("table", "embedding", "input", "recurrent", "head")
    }
    return found if all(array.dtype == np.float32 for array in found.values()) else None
