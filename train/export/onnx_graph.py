"""CharRNN's ONNX graph, written out operator by operator; docs/model-file.md specifies the result.

It is not traced: torch's dynamo exporter wrote silently wrong GRUs up to onnxscript 0.7.1 (pytorch#189225), and
defaults to external data. The cells are written out too, rather than left to ONNX's GRU and LSTM, of which there are
none in int8: every precision has the same graph, and the first layer's product with the embedding becomes a table.
Letters: B batch, T seq_len, N characters to draw; E, H, L, V as in docs/how-it-works.md; G 3H for GRU, 4H for LSTM.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from charrnn import __version__
from charrnn.config import ModelConfig
from charrnn.vocab import Vocab
from train.export.quantize import Precision, by_column, pack_columns

# An old opset and file version run in more runtimes.
_OPSET = 17
_IR_VERSION = 8
_CONTRIB = "com.microsoft"

# torch stacks gates GRU r, z, n; LSTM i, f, g, o. Here those of a sigmoid lie side by side: r, z, n; i, f, o, g.
_GATE_ORDER = {"GRU": (0, 1, 2), "LSTM": (0, 1, 3, 2)}
# Above this many symbols a table of embeddings already multiplied, (V, G), would outgrow what it replaces.
_TABLE_UP_TO = 512
_NORM_EPSILON = 1e-5  # torch's

Weights = dict[str, NDArray[np.float32]]


def build_onnx(
    config: ModelConfig, vocab: Vocab, weights: Weights, metadata: dict[str, str], precision: Precision = "fp32"
) -> onnx.ModelProto:
    """The model as an ONNX graph with every weight inside.

    weights: torch's state dict of a CharRNN, as numpy arrays. precision: of the matrices, see train.export.quantize.

    Inputs `ids` (B, T) int64, `h` and for LSTM `c` (L, B, H); outputs `logits` (B, T, V), `h_next`, `c_next`. B and T
    are dynamic. With the optional inputs `uniforms` (B, N) and how to sample it goes on to draw N characters after
    `ids`, the output `drawn` (B, N).
    """
    return build_of_matrices(config, vocab, matrices_of(config, weights), metadata, precision)


def build_of_matrices(
    config: ModelConfig, vocab: Vocab, matrices: Weights, metadata: dict[str, str], precision: Precision = "fp32"
) -> onnx.ModelProto:
    """`build_onnx` of what `matrices_of` makes of weights, or `matrices_in` finds in a file."""
    return _Writer(config, vocab, matrices, precision).model(metadata)


def matrices_of(config: ModelConfig, weights: Weights) -> Weights:
    """What the graph multiplies with and adds, in float32: of `weights`, torch's state dict of a CharRNN.

    `table` (V, G), the first layer's input for each symbol, or for a large vocabulary `embedding` (V, E) and `input0`
    (E, G); `input1` ... (H, G), `recurrent0` ... (H, G), `head` (H, V), each of these with its `..._bias`. With layer
    normalisation `input1` ... and `head` have a `..._shift` instead, see `_after_norm`.
    """
    found: Weights = {}
    embedding = weights["embedding.weight"]  # (V, E)
    for i in range(config.num_layers):
        w, r, b_w, b_r = (
            reordered(weights[f"rnn.{name}_l{i}"], _GATE_ORDER[config.rnn])
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        inner = np.zeros_like(b_r)
        if config.rnn == "GRU":  # the candidate's recurrent bias comes under the reset gate
            inner[-config.hidden_dim :] = b_r[-config.hidden_dim :]
        if i == 0 and len(embedding) <= _TABLE_UP_TO:
            found["table"] = (embedding.astype(np.float64) @ w.T + (b_w + b_r - inner)).astype(np.float32)
        else:
            found |= _reading(f"input{i}", w.T, b_w + b_r - inner, weights, i - 1)
        found |= {f"recurrent{i}": r.T, f"recurrent{i}_bias": inner}
    if "table" not in found:
        found["embedding"] = embedding
    return found | _reading("head", weights["head.weight"].T, weights["head.bias"], weights, config.num_layers - 1)


def _reading(
    name: str, matrix: NDArray[np.float32], bias: NDArray[np.float32], weights: Weights, layer: int
) -> Weights:
    """A matrix (H, N) that multiplies what `layer` gives, and its bias (N,); behind a normalisation, folded into it.

    LayerNorm(h) = (h - mean h) / s * gain + offset, so its product with W is (h W') / s + shift, where the columns of
    W' = gain W less their means add up to 0, which takes the mean of h away, and shift = offset W + bias. What is
    multiplied stays h itself, between -1 and 1.
    """
    gain = weights.get(f"norms.{layer}.weight")
    if gain is None:
        return {name: matrix, f"{name}_bias": bias}
    wide = gain[:, None].astype(np.float64) * matrix
    shift = weights[f"norms.{layer}.bias"].astype(np.float64) @ matrix + bias
    return {name: (wide - wide.mean(axis=0)).astype(np.float32), f"{name}_shift": shift.astype(np.float32)}


def matrices_in(model: onnx.ModelProto) -> Weights | None:
    """`matrices_of` read back from a float32 file; None when its weights are not float32 or not laid out so."""
    found = {
        t.name: numpy_helper.to_array(t)
        for t in model.graph.initializer
        if re.sub("_(bias|shift)$", "", t.name).rstrip("0123456789")
        in ("table", "embedding", "input", "recurrent", "head")
    }
    whole = {"recurrent0", "head"} <= found.keys() and all(a.dtype == np.float32 for a in found.values())
    return found if whole else None


def reordered(stacked: NDArray[np.float32], order: Sequence[int]) -> NDArray[np.float32]:
    """Gates stacked along axis 0, (G, ...), put into another order."""
    gates = np.split(stacked, len(order), axis=0)
    return np.concatenate([gates[g] for g in order], axis=0)


class _Nodes:
    """The nodes of one graph or subgraph; every value is named after `prefix` and a number."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        # A state -> the same in 8 bits.
        self.steps: dict[str, str] = {}
        self._prefix = prefix

    def many(self, kind: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Adds a node with `count` outputs, and returns their names."""
        outputs = [f"{self._prefix}{kind}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def one(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, and returns its name."""
        return self.many(kind, inputs, 1, **attributes)[0]

    def named(self, name: str, kind: str, *inputs: str, **attributes: Any) -> None:
        """Adds a node with one output of that name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))


class _Writer:
    """Writes one model. A state is a list of L * (1 or 2) values (B, H): of layer 0 h (and c), of layer 1, ..."""

    def __init__(self, config: ModelConfig, vocab: Vocab, matrices: Weights, precision: Precision) -> None:
        self._rnn, self._layers, self._width = config.rnn, config.num_layers, config.hidden_dim
        self._states = ("h",) if config.rnn == "GRU" else ("h", "c")
        self._vocab_size, self._precision = len(vocab), precision
        self._has_documents = vocab.document_end_id is not None
        self._folded = "table" in matrices
        gates = len(_GATE_ORDER[config.rnn])
        self._constants: dict[str, NDArray[Any]] = {
            "axis_0": np.array([0]),
            "axis_1": np.array([1]),
            "axis_2": np.array([2]),
            "far": np.array([np.iinfo(np.int64).max]),
            "zero": np.array(0),
            "one": np.array(1),
            "minus_1": np.array(-1),
            "minus_1s": np.array([-1]),
            "minus_1_width": np.array([-1, self._width]),
            "true": np.array(True),
            "one_each": np.ones(self._layers, np.int64),
            "two_widths": np.array([self._width] * 2),
            "three_widths": np.array([self._width] * 3),
            "switches_candidate": np.array([(gates - 1) * self._width, self._width]),
            "all_symbols": np.array(len(vocab)),
            # (V, 1): 0 for the symbol before which the state is zeroed.
            "goes_on": (np.arange(len(vocab)) != vocab.document_end_id).astype(np.float32)[:, None],
            "zero_f64": np.array(0.0),
            "one_f64": np.array(1.0),
            "least_temperature": np.array(1e-200),
            "minus_infinity": np.array(-np.inf, np.float32),
            "state_scale": np.array(1 / 127, np.float32),
            "state_middle": np.array(128, np.uint8),
            "no_scale": np.array(1, np.float32),
            "one_gains": np.ones(self._width, np.float32),
        }
        self._packed: dict[str, dict[str, Any]] = {}
        for name, matrix in matrices.items():
            if name.endswith("_shift"):
                self._constants[name] = matrix
            elif not name.endswith("_bias"):
                self._store(name, matrix, matrices.get(f"{name}_bias"))

    def _store(self, name: str, matrix: NDArray[np.float32], bias: NDArray[np.float32] | None) -> None:
        """Keeps a matrix in the file's precision: what is looked up in float16, what is multiplied with in integers."""
        if bias is not None:
            self._constants[f"{name}_bias"] = bias
        if self._precision == "fp32":
            self._constants[name] = matrix
        elif name in ("table", "embedding"):
            self._constants[name] = matrix.astype(np.float16)
        elif self._precision == "int8" and name != "input0":
            rounded = by_column(matrix, bias)
            self._constants |= {name: rounded.steps, f"{name}_scale": rounded.scales, f"{name}_bias": rounded.bias}
        else:
            packed = pack_columns(matrix, self._precision)
            self._constants |= {name: packed.blocks, f"{name}_scale": packed.scales}
            self._packed[name] = {
                "K": matrix.shape[0],
                "N": matrix.shape[1],
                "bits": packed.bits,
                "block_size": packed.block_size,
                "accuracy_level": 4,  # activations in int8 as well
            }

    def _product(self, at: _Nodes, value: str, name: str) -> str:
        """`value` (..., K), normalised if the model does so, times a stored matrix (K, N), plus its bias: (..., N)."""
        if f"{name}_shift" not in self._constants:
            return self._plain_product(at, value, name, f"{name}_bias")
        inverse = at.many("LayerNormalization", [value, "one_gains"], 3, axis=-1, epsilon=_NORM_EPSILON)[2]  # (..., 1)
        scaled = at.one("Mul", self._plain_product(at, value, name, ""), inverse)
        return at.one("Add", scaled, f"{name}_shift")

    def _plain_product(self, at: _Nodes, value: str, name: str, bias: str) -> str:
        """`value` (..., K) times a stored matrix (K, N), plus a stored bias if one is named: (..., N)."""
        if self._precision == "fp32":
            product = at.one("MatMul", value, name)
            return at.one("Add", product, bias) if bias else product
        if name in self._packed:
            inputs = [value, name, f"{name}_scale", *(["", "", bias] if bias else [])]
            return at.one("MatMulNBits", *inputs, **self._packed[name], domain=_CONTRIB)
        # Given a scale a column, onnxruntime (1.32) spends as long on them as on the whole product of one row.
        inputs = [
            self._steps(at, value),
            name,
            "state_scale",
            "no_scale",
            "state_middle",
            *(["", bias] if bias else []),
        ]
        return at.one("Mul", at.one("MatMulIntegerToFloat", *inputs, domain=_CONTRIB), f"{name}_scale")

    def _steps(self, at: _Nodes, state: str) -> str:
        """What a cell gives, (..., H), in 8 bits, made once for all products of a graph that take it.

        It lies between -1 and 1, so that one scale fits all rows of a batch, and none sees another.
        """
        if state not in at.steps:
            at.steps[state] = at.one("QuantizeLinear", state, "state_scale", "state_middle")
        return at.steps[state]

    # ---- the network

    def _inputs_of_first(self, at: _Nodes, ids: str) -> str:
        """What the first layer's gates take from characters. ids: (...). Returns (..., G)."""
        rows = at.one("Gather", "table" if self._folded else "embedding", ids)
        if self._precision != "fp32":
            rows = at.one("Cast", rows, to=TensorProto.FLOAT)
        return rows if self._folded else self._product(at, rows, "input0")

    def _cell(self, at: _Nodes, layer: int, gates: str, state: Sequence[str]) -> list[str]:
        """One layer, one character. gates: (B, G), what the input gives. state: (h,) or (h, c), each (B, H)."""
        recurrent = self._product(at, state[0], f"recurrent{layer}")  # (B, G)
        if self._rnn == "LSTM":
            switches, candidate = at.many("Split", [at.one("Add", gates, recurrent), "switches_candidate"], 2, axis=1)
            i, f, o = at.many("Split", [at.one("Sigmoid", switches), "three_widths"], 3, axis=1)  # each (B, H)
            kept, added = at.one("Mul", f, state[1]), at.one("Mul", i, at.one("Tanh", candidate))
            c = at.one("Add", kept, added)
            return [at.one("Mul", o, at.one("Tanh", c)), c]
        switches_x, candidate_x = at.many("Split", [gates, "switches_candidate"], 2, axis=1)  # (B, 2H), (B, H)
        switches_h, candidate_h = at.many("Split", [recurrent, "switches_candidate"], 2, axis=1)
        switches = at.one("Sigmoid", at.one("Add", switches_x, switches_h))
        r, z = at.many("Split", [switches, "two_widths"], 2, axis=1)  # each (B, H)
        n = at.one("Tanh", at.one("Add", candidate_x, at.one("Mul", r, candidate_h)))
        return [at.one("Add", n, at.one("Mul", z, at.one("Sub", state[0], n)))]

    def _step(self, at: _Nodes, ids: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """One character. ids: (B,). Returns the logits (B, V), and the state after it."""
        per_layer = len(self._states)
        after: list[str] = []
        gates = self._inputs_of_first(at, ids)  # (B, G)
        if self._has_documents:
            state = self._kept(at, state, at.one("Gather", "goes_on", ids))
        for i in range(self._layers):
            gates = self._product(at, after[-per_layer], f"input{i}") if i else gates
            after += self._cell(at, i, gates, state[i * per_layer : (i + 1) * per_layer])
        return self._product(at, after[-per_layer], "head"), after

    def _read(self, at: _Nodes, ids: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """T characters, layer by layer. ids: (B, T). Returns the logits (B, T, V), and the state after the last."""
        per_layer = len(self._states)
        after: list[str] = []
        by_time = at.one("Transpose", ids, perm=[1, 0])  # (T, B)
        gates = self._inputs_of_first(at, at.one("Reshape", by_time, "minus_1s"))  # (T * B, G)
        gates, hidden = self._unflattened(at, gates, by_time), ""  # (T, B, G)
        kept = [at.one("Gather", "goes_on", by_time)] if self._has_documents else []  # (T, B, 1)
        for i in range(self._layers):
            gates = self._product_of_all(at, hidden, by_time, f"input{i}") if i else gates
            *last, hidden = self._scan(at, i, [gates, *kept], state[i * per_layer : (i + 1) * per_layer])
            after += last
        logits = self._product_of_all(at, at.one("Transpose", hidden, perm=[1, 0, 2]), ids, "head")
        return logits, after

    def _product_of_all(self, at: _Nodes, values: str, ids: str, name: str) -> str:
        """`_product` of (X, Y, K), for `ids` (X, Y), as one of (X * Y, K): it rounds as that of one character."""
        return self._unflattened(at, self._product(at, at.one("Reshape", values, "minus_1_width"), name), ids)

    def _unflattened(self, at: _Nodes, values: str, ids: str) -> str:
        """(X * Y, K) as (X, Y, K), for `ids` (X, Y)."""
        return at.one("Reshape", values, at.one("Concat", at.one("Shape", ids), "minus_1s", axis=0))

    def _kept(self, at: _Nodes, state: Sequence[str], kept: str) -> list[str]:
        """The state, zeroed where a document ends. kept: (B, 1), 0 there and 1 elsewhere."""
        return [at.one("Mul", part, kept) for part in state]

    def _scan(self, at: _Nodes, layer: int, steps: Sequence[str], state: Sequence[str]) -> list[str]:
        """One layer over T characters. Returns its last state, and h at every one (T, B, H).

        steps: gates (T, B, G), and with documents where the state is kept (T, B, 1).
        """
        inner = _Nodes(f"layer{layer}_")
        before = [f"layer{layer}_{s}" for s in self._states]
        gates, *kept = (f"layer{layer}_{s}" for s in ("gates", "goes_on")[: len(steps)])
        after = self._cell(inner, layer, gates, self._kept(inner, before, *kept) if kept else before)
        shown = inner.one("Identity", after[0])
        body = helper.make_graph(
            inner.nodes,
            f"layer{layer}",
            [_float(name, "B", None) for name in [*before, gates, *kept]],
            [_float(name, "B", None) for name in [*after, shown]],
        )
        return at.many("Scan", [*state, *steps], len(after) + 1, body=body, num_scan_inputs=len(steps))

    # ---- drawing

    def _draw(self, at: _Nodes, prefix: str, logits: str, uniforms: str) -> str:
        """Characters by charrnn.sampling's rules. logits: (B, V), uniforms: (B, 1) float64. Returns (B,) int64."""
        limited, others = _Nodes(f"{prefix}limited_"), _Nodes(f"{prefix}others_")
        values, order = limited.many("TopK", [logits, "kept_symbols"], 2, axis=1, sorted=0)  # (B, K)
        limited.named(f"{prefix}largest", "ScatterElements", "nothing", order, values, axis=1)
        cut, every = _Nodes(f"{prefix}cut_"), _Nodes(f"{prefix}every_")
        self._cut(cut, prefix, logits)
        every.named(f"{prefix}all", "Identity", logits)
        others.named(
            f"{prefix}left",
            "If",
            "is_cut",
            then_branch=helper.make_graph(cut.nodes, "cut", [], [_float(f"{prefix}few", "B", None)]),
            else_branch=helper.make_graph(every.nodes, "all", [], [_float(f"{prefix}all", "B", None)]),
        )
        kept = at.one(  # (B, V), -inf for what is not kept; top-k alone, which is asked for most, takes one If
            "If",
            "is_only_limited",
            then_branch=helper.make_graph(limited.nodes, "limited", [], [_float(f"{prefix}largest", "B", None)]),
            else_branch=helper.make_graph(others.nodes, "others", [], [_float(f"{prefix}left", "B", None)]),
        )
        wide = at.one("Cast", kept, to=TensorProto.DOUBLE)
        shares = at.one("Softmax", at.one("Div", wide, "safe_temperature"), axis=1)
        line = at.one("CumSum", shares, "one")  # (B, V), the shares laid end to end
        target = at.one("Mul", uniforms, at.one("Gather", line, "minus_1s", axis=1))  # (B, 1)
        # The first character whose end lies beyond the target; of NaN it is 0, which the engine finds out later.
        beyond = at.one("Cast", at.one("Greater", line, target), to=TensorProto.UINT8)
        return at.one("ArgMax", beyond, axis=1, keepdims=0)

    def _cut(self, at: _Nodes, prefix: str, logits: str) -> None:
        """The logits (B, V) that top-k, top-p and min-p leave; the rest is -inf."""
        ranked, order = at.many("TopK", [logits, "kept_symbols"], 2, axis=1)  # (B, K), the likeliest first
        wide = at.one("Cast", ranked, to=TensorProto.DOUBLE)
        shifted = at.one("Sub", wide, at.one("Gather", wide, "axis_0", axis=1))
        shares = at.one("Exp", at.one("Div", shifted, "temperature"))  # (B, K), the likeliest has 1
        before = at.one("CumSum", shares, "one", exclusive=1)
        total = at.one("ReduceSum", shares, "axis_1", keepdims=1)  # (B, 1)
        # With top_p 1 rounding must not drop the last ones.
        inside = at.one("Or", at.one("Less", before, at.one("Mul", total, "top_p")), "is_whole")
        inside = at.one("And", inside, at.one("GreaterOrEqual", shares, "min_p"))
        values = at.one("Where", inside, ranked, "minus_infinity")
        at.named(f"{prefix}few", "ScatterElements", "nothing", order, values, axis=1)

    def _options(self, at: _Nodes, last: str) -> None:
        """What is the same for every character of a call. last: (B, V), some logits."""
        limited = at.one("Greater", "top_k", "zero")
        at.named("top_symbols", "Where", limited, at.one("Min", "top_k", "all_symbols"), "all_symbols")
        at.named("kept_symbols", "Reshape", "top_symbols", "minus_1s")  # (1,)
        at.named("is_whole", "GreaterOrEqual", "top_p", "one_f64")
        at.named("is_cut", "Or", at.one("Not", "is_whole"), at.one("Greater", "min_p", "zero_f64"))
        is_limited = at.one("Less", "top_symbols", "all_symbols")
        at.named("is_only_limited", "And", is_limited, at.one("Not", "is_cut"))
        # Logits are float32: divided by this they stay finite, and the shares are those of any smaller temperature.
        at.named("safe_temperature", "Max", "temperature", "least_temperature")
        # (B, V) of -inf: of a shape that no one can make larger than the logits.
        at.named("nothing", "Where", at.one("Greater", last, last), last, "minus_infinity")

    def _generate(self, at: _Nodes, logits: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """Draws N characters after logits (B, T, V) and the state there. Returns (B, N), and the state before the last.

        The loop stands in the main graph, and not in a branch for N above 0: two levels deep onnxruntime (1.32) leaves
        quantised matrices unpacked, and runs 15 times slower.
        """
        rows = at.one("Shape", "ids", start=0, end=1)  # (1,)
        last = at.one("Gather", logits, "minus_1", axis=1)  # (B, V)
        self._options(at, last)
        by_time = at.one("Transpose", at.one("Unsqueeze", "uniforms", "axis_2"), perm=[1, 0, 2])  # (N, B, 1)
        first, nothing = _Nodes("first_"), _Nodes("none_")
        first_ids = self._draw(first, "first_", last, first.one("Gather", by_time, "zero", axis=0))
        first.named("first_id", "Unsqueeze", first_ids, "axis_0")
        none = nothing.one("Concat", "axis_0", rows, axis=0)
        nothing.named("no_id", "ConstantOfShape", none, value=helper.make_tensor("value", TensorProto.INT64, [1], [0]))
        id_0 = at.one(  # (1, B), or (0, B) for N = 0
            "If",
            at.one("Greater", "num_drawn", "zero"),
            then_branch=helper.make_graph(first.nodes, "first", [], [_ids("first_id", None, "B")]),
            else_branch=helper.make_graph(nothing.nodes, "none", [], [_ids("no_id", None, "B")]),
        )
        rest = at.one("Max", at.one("Sub", "num_drawn", "one"), "zero")
        at.named("rest_of_uniforms", "Slice", by_time, "axis_1", "far")  # (N - 1, B, 1)
        start = at.one("Reshape", id_0, "minus_1s")  # (B,), or none for the loop that never runs
        steps = self._steps_of_layers(at, state)
        carried = [start, *state, *steps]
        loop = at.many("Loop", [rest, "true", *carried], len(carried) + 1, body=self._loop_body(len(state), len(steps)))
        # Of no iterations the loop does not know B.
        shape = at.one("Concat", at.one("Reshape", rest, "minus_1s"), rows, axis=0)
        ids = at.one("Concat", id_0, at.one("Reshape", loop[-1], shape, allowzero=1), axis=0)  # (N, B)
        return at.one("Transpose", ids, perm=[1, 0]), loop[1 : len(state) + 1]

    def _steps_of_layers(self, at: _Nodes, state: Sequence[str]) -> list[str]:
        """Every layer's h in 8 bits, (B, H), which the loop hands on so as to make them once; none in other files."""
        hidden = state[:: len(self._states)] if self._precision == "int8" else []
        return [self._steps(at, h) for h in hidden]

    def _loop_body(self, parts: int, num_steps: int) -> onnx.GraphProto:
        """Feeds a character to the network and draws the next."""
        at = _Nodes("loop_")
        before = [f"loop_state{i}" for i in range(parts)]
        steps = [f"loop_steps{i}" for i in range(num_steps)]
        at.steps = dict(zip(before[:: len(self._states)], steps, strict=False))
        logits, after = self._step(at, "loop_ids", before)
        uniforms = at.one("Gather", "rest_of_uniforms", "loop_i", axis=0)  # (B, 1)
        drawn = self._draw(at, "loop_", logits, uniforms)  # (B,)
        at.named("loop_goes_on", "Identity", "loop_condition")
        shown = at.one("Identity", drawn)
        tensor = helper.make_tensor_value_info
        return helper.make_graph(
            at.nodes,
            "loop",
            [
                tensor("loop_i", TensorProto.INT64, []),
                tensor("loop_condition", TensorProto.BOOL, []),
                _ids("loop_ids", "B"),
                *(_float(name, "B", self._width) for name in before),
                *(tensor(name, TensorProto.UINT8, ["B", self._width]) for name in steps),
            ],
            [
                tensor("loop_goes_on", TensorProto.BOOL, []),
                _ids(drawn, "B"),
                *(_float(name, "B", self._width) for name in after),
                *(tensor(name, TensorProto.UINT8, ["B", self._width]) for name in self._steps_of_layers(at, after)),
                _ids(shown, "B"),
            ],
        )

    # ---- the file

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """The whole of it, checked."""
        at = _Nodes("")
        state = self._split_state(at)
        logits, after = self._read(at, "ids", state)
        at.named("logits", "Identity", logits)
        at.named("num_drawn", "Gather", at.one("Shape", "uniforms", start=1, end=2), "zero")
        drawn, after = self._generate(at, logits, after)
        self._join_state(at, after)
        at.named("drawn", "Identity", drawn)
        graph = helper.make_graph(at.nodes, "charrnn", self._graph_inputs(), self._graph_outputs())
        defaults = {
            "uniforms": np.zeros((1, 0)),
            "temperature": np.array(1.0),
            "top_k": np.array(0, np.int64),
            "top_p": np.array(1.0),
            "min_p": np.array(0.0),
        }
        used = _values_read(graph)
        for name, array in {**{n: a for n, a in self._constants.items() if n in used}, **defaults}.items():
            # Python's integers are of 32 bits on some systems.
            wide = array.astype(np.int64) if array.dtype == np.int_ else array
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(wide).reshape(array.shape), name))
        opsets = [helper.make_opsetid("", _OPSET)]
        if self._precision != "fp32":
            opsets.append(helper.make_opsetid(_CONTRIB, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        model.producer_name, model.producer_version = "charrnn", __version__
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _split_state(self, at: _Nodes) -> list[str]:
        """The inputs, each (L, B, H), as a list of (B, H)."""
        parts = []
        for s in self._states:
            layers = at.many("Split", [s, "one_each"], self._layers, axis=0)  # each (1, B, H)
            parts.append([at.one("Squeeze", layer, "axis_0") for layer in layers])
        return [part for layer in zip(*parts, strict=True) for part in layer]

    def _join_state(self, at: _Nodes, state: Sequence[str]) -> None:
        for k, s in enumerate(self._states):
            layers = [at.one("Unsqueeze", part, "axis_0") for part in state[k :: len(self._states)]]
            at.named(f"{s}_next", "Concat", *layers, axis=0)

    def _graph_inputs(self) -> list[onnx.ValueInfoProto]:
        tensor = helper.make_tensor_value_info
        return [
            tensor("ids", TensorProto.INT64, ["B", "T"]),
            *(tensor(s, TensorProto.FLOAT, [self._layers, "B", self._width]) for s in self._states),
            tensor("uniforms", TensorProto.DOUBLE, [None, "N"]),
            tensor("temperature", TensorProto.DOUBLE, []),
            tensor("top_k", TensorProto.INT64, []),
            tensor("top_p", TensorProto.DOUBLE, []),
            tensor("min_p", TensorProto.DOUBLE, []),
        ]

    def _graph_outputs(self) -> list[onnx.ValueInfoProto]:
        tensor = helper.make_tensor_value_info
        return [
            tensor("logits", TensorProto.FLOAT, ["B", "T", self._vocab_size]),
            *(tensor(f"{s}_next", TensorProto.FLOAT, [self._layers, "B", self._width]) for s in self._states),
            tensor("drawn", TensorProto.INT64, ["B", "N"]),
        ]


def _values_read(graph: onnx.GraphProto) -> set[str]:
    """The names of all values that nodes of a graph and of those inside it take."""
    found: set[str] = set()
    for node in graph.node:
        found |= set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _values_read(attribute.g)
    return found


def _float(name: str, *shape: str | int | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _double(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["B", None])


def _ids(name: str, *shape: str | int | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, list(shape))
