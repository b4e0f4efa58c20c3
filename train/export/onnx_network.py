"""The network's nodes: one character for the loop that generates, and T characters layer by layer.

It is not traced: torch's dynamo exporter wrote silently wrong GRUs up to onnxscript 0.7.1 (pytorch#189225), and
defaults to external data. The cells are written out rather than left to ONNX's GRU and LSTM, which don't exist in
int8: both precisions have the same graph, and the first layer's product with the embedding becomes a table.
Letters: B batch, T characters read; E, H, L, V as in docs/model-file.md; G 3H for GRU, 4H for LSTM.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from charrnn.config import ModelConfig
from charrnn.vocab import Vocab
from infer.model_file.layout import STATES, Sizes, constants
from train.export.graph_builder import GraphBuilder, float32, tensor
from train.export.quantize import Precision, quantize_columns, quantize_embedding
from train.export.weights import Weights

CONTRIB = "com.microsoft"
_NORM_EPSILON = 1e-5  # torch's


class Network:
    """Write the network's nodes. A state is a list of L * (1 or 2) values (B, H): of layer 0 h (and c), of 1, ...

    Attributes:
        states: ("h",) or ("h", "c").
        is_int8: Whether products are of integers.
        initializers: The constants, and the weights in the file's precision.
    """

    def __init__(self, config: ModelConfig, vocab: Vocab, folded: Weights, precision: Precision) -> None:
        sizes = Sizes(config.rnn, len(vocab), config.hidden_dim, config.num_layers, vocab.document_end_id)
        self.states = STATES[config.rnn]
        self.is_int8 = precision == "int8"
        self.initializers: dict[str, NDArray[Any]] = constants(sizes)
        self._rnn, self._layers, self._width = config.rnn, config.num_layers, config.hidden_dim
        self._resets = vocab.document_end_id is not None
        self._has_table = "table" in folded
        if self.is_int8 and not self._has_table:
            steps, scaled = quantize_embedding(folded["embedding"], folded["input0"])
            folded = folded | {"input0": scaled}
            self.initializers["embedding"] = steps
        for name, matrix in folded.items():
            if not name.endswith("_bias"):
                self._store(name, matrix, folded.get(f"{name}_bias"))

    def _store(self, name: str, matrix: NDArray[np.float32], bias: NDArray[np.float32] | None) -> None:
        """Keep a matrix in the file's precision: the table in float16, what is multiplied with in integers."""
        if self.is_int8 and name == "table":
            self.initializers[name] = matrix.astype(np.float16)
        elif self.is_int8 and not name.endswith("_shift"):
            if name != "embedding":
                names = (name, f"{name}_scale", f"{name}_bias")
                self.initializers |= zip(names, quantize_columns(matrix, bias), strict=True)
        else:
            self.initializers[name] = matrix
            if bias is not None:
                self.initializers[f"{name}_bias"] = bias

    # ---- products

    def _product(self, op: GraphBuilder, value: str, name: str) -> str:
        """`value` (..., K), normalised if the model does so, times a matrix (K, N), plus its bias: (..., N)."""
        if f"{name}_shift" not in self.initializers:
            return self._affine(op, value, name, f"{name}_bias")
        inverse = op.multiple("LayerNormalization", [value, "one_gains"], 3, axis=-1, epsilon=_NORM_EPSILON)[2]
        return op.Add(op.Mul(self._affine(op, value, name, ""), inverse), f"{name}_shift")  # inverse: (..., 1)

    def _affine(self, op: GraphBuilder, value: str, name: str, bias: str) -> str:
        """`value` (..., K) times a matrix (K, N), plus a bias (N,) if one is named: (..., N)."""
        if not self.is_int8:
            product = op.MatMul(value, name)
            return op.Add(product, bias) if bias else product
        # With a scale per column inside the product, onnxruntime (1.32) spends as long on them as on one row's product.
        inputs = [self.quantized(op, value), name, "state_scale", "no_scale", "state_zero_point"]
        product = op.MatMulIntegerToFloat(*inputs, *(["", bias] if bias else []), domain=CONTRIB)
        return op.Mul(product, f"{name}_scale")

    def quantized(self, op: GraphBuilder, state: str) -> str:
        """A cell's output (..., H) in 8 bits, made once for all products of a graph that take it.

        It lies between -1 and 1, so that one scale fits all rows of a batch, and no row depends on another.
        """
        if state not in op.quantized:
            op.quantized[state] = op.QuantizeLinear(state, "state_scale", "state_zero_point")
        return op.quantized[state]

    # ---- one character

    def step(self, op: GraphBuilder, ids: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """Read one character, ids (B,). Returns the logits (B, V) and the state after it."""
        parts = len(self.states)
        after: list[str] = []
        gates = self._first_gates(op, ids)  # (B, G)
        if self._resets:
            state = _scaled(op, state, op.Gather("keep_state", ids))
        for i in range(self._layers):
            gates = self._product(op, after[-parts], f"input{i}") if i else gates
            after += self._cell(op, i, gates, state[i * parts : (i + 1) * parts])
        return self._product(op, after[-parts], "head"), after

    def _first_gates(self, op: GraphBuilder, ids: str) -> str:
        """The first layer's gates from its input alone. ids: (...). Returns (..., G)."""
        if self._has_table:
            rows = op.Gather("table", ids)
            return op.Cast(rows, to=TensorProto.FLOAT) if self.is_int8 else rows
        rows = op.Gather("embedding", ids)
        op.quantized[rows] = rows  # an embedding of an int8 file is in 8 bits already
        return self._product(op, rows, "input0")

    def _cell(self, op: GraphBuilder, layer: int, gates: str, state: Sequence[str]) -> list[str]:
        """One layer, one character. gates: (B, G), what the input gives. state: (h,) or (h, c), each (B, H)."""
        recurrent = self._product(op, state[0], f"recurrent{layer}")  # (B, G)
        if self._rnn == "LSTM":
            switches, g = op.multiple("Split", [op.Add(gates, recurrent), "switches_candidate"], 2, axis=1)
            i, f, o = op.multiple("Split", [op.Sigmoid(switches)], 3, axis=1)  # each (B, H)
            c = op.Add(op.Mul(f, state[1]), op.Mul(i, op.Tanh(g)))
            return [op.Mul(o, op.Tanh(c)), c]
        switches_x, candidate_x = op.multiple("Split", [gates, "switches_candidate"], 2, axis=1)  # (B, 2H), (B, H)
        switches_h, candidate_h = op.multiple("Split", [recurrent, "switches_candidate"], 2, axis=1)
        r, z = op.multiple("Split", [op.Sigmoid(op.Add(switches_x, switches_h))], 2, axis=1)  # each (B, H)
        n = op.Tanh(op.Add(candidate_x, op.Mul(r, candidate_h)))
        return [op.Add(n, op.Mul(z, op.Sub(state[0], n)))]

    # ---- many characters

    def read(self, op: GraphBuilder, ids: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """Read ids (B, T), layer by layer. Returns the logits (B, T, V) and the state after the last."""
        parts = len(self.states)
        after: list[str] = []
        by_time = op.Transpose(ids, perm=[1, 0])  # (T, B)
        gates = self._first_gates(op, op.Reshape(by_time, "minus_1s"))  # (T * B, G)
        gates, hidden = _unflattened(op, gates, by_time), ""  # (T, B, G)
        kept = [op.Gather("keep_state", by_time)] if self._resets else []  # (T, B, 1)
        for i in range(self._layers):
            gates = self._product_of_all(op, hidden, by_time, f"input{i}") if i else gates
            *last, hidden = self._scan(op, i, [gates, *kept], state[i * parts : (i + 1) * parts])
            after += last
        return self._product_of_all(op, op.Transpose(hidden, perm=[1, 0, 2]), ids, "head"), after

    def _product_of_all(self, op: GraphBuilder, values: str, ids: str, name: str) -> str:
        """`_product` of (X, Y, K), for `ids` (X, Y), as one of (X * Y, K): it rounds as that of one character."""
        return _unflattened(op, self._product(op, op.Reshape(values, "minus_1_width"), name), ids)

    def _scan(self, op: GraphBuilder, layer: int, steps: Sequence[str], state: Sequence[str]) -> list[str]:
        """One layer over T characters. Returns its last state, and h at every one (T, B, H).

        steps: gates (T, B, G), and with documents whether the state is kept (T, B, 1).
        """
        inner = GraphBuilder(f"layer{layer}_")
        before = [f"layer{layer}_{s}" for s in self.states]
        gates, *kept = (f"layer{layer}_{s}" for s in ("gates", "keep_state")[: len(steps)])
        after = self._cell(inner, layer, gates, _scaled(inner, before, *kept) if kept else before)
        shown = inner.Identity(after[0])
        body = inner.graph(
            [float32(name, "B", None) for name in [*before, gates, *kept]],
            [float32(name, "B", None) for name in [*after, shown]],
        )
        return op.multiple("Scan", [*state, *steps], len(after) + 1, body=body, num_scan_inputs=len(steps))

    # ---- the state's inputs and outputs

    def state_tensors(self, name: str) -> list[onnx.ValueInfoProto]:
        """The declarations of the graph's states, (L, B, H), named by a pattern."""
        return [float32(name.format(s), self._layers, "B", self._width) for s in self.states]

    def layer_state(self, name: str) -> onnx.ValueInfoProto:
        """The declaration of one part of a layer's state, (B, H)."""
        return float32(name, "B", self._width)

    def layer_quantized(self, name: str) -> onnx.ValueInfoProto:
        """The declaration of a layer's h in 8 bits, (B, H)."""
        return tensor(name, TensorProto.UINT8, ["B", self._width])

    def split_state(self, op: GraphBuilder) -> list[str]:
        """The inputs, each (L, B, H), as a list of (B, H)."""
        parts = []
        for s in self.states:
            layers = op.multiple("Split", [s, "one_each"], self._layers, axis=0)  # each (1, B, H)
            parts.append([op.Squeeze(layer, "axis_0") for layer in layers])
        return [part for layer in zip(*parts, strict=True) for part in layer]

    def join_state(self, op: GraphBuilder, state: Sequence[str]) -> None:
        """The outputs, each (L, B, H), from a list of (B, H)."""
        for k, s in enumerate(self.states):
            layers = [op.Unsqueeze(part, "axis_0") for part in state[k :: len(self.states)]]
            op.Concat(*layers, name=f"{s}_next", axis=0)


def _scaled(op: GraphBuilder, state: Sequence[str], kept: str) -> list[str]:
    """The state, reset where a document ends. kept: (B, 1), 0 there and 1 elsewhere."""
    return [op.Mul(part, kept) for part in state]


def _unflattened(op: GraphBuilder, values: str, ids: str) -> str:
    """(X * Y, K) as (X, Y, K), for `ids` (X, Y)."""
    return op.Reshape(values, op.Concat(op.Shape(ids), "minus_1s", axis=0))
