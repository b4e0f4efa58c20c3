"""A look into an ONNX file before onnxruntime opens it: what is not built like charrnn's is refused unrun.

onnxruntime reads other files that a model points to, allocates what a model declares, and believes its numbers; some
graphs end its process. So the file must consist of the parts that train/export/onnx_graph.py writes and of nothing
else: these protobuf fields, these weights in these shapes, these constants with these values, and nodes that are each
joined to its neighbours in one of the ways listed in graph_forms. It needs no package for ONNX; weights stay unread.
Source: onnx.proto (IR version 8). Letters: V, E, H, L as in docs/model-file.md. G is 3H for GRU and 4H for LSTM; a
matrix is (K, N), as in MatMulNBits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.model_file.graph_forms import EARLIER, FORMS, OPERATORS
from infer.model_file.protobuf import DamagedError, Fields, Reader, Span, UnsafeError, span

# protobuf's own limit for a message, and so onnxruntime's for a file.
MAX_FILE_BYTES = 2**31 - 1
# A vocabulary of every Unicode character takes 11 MiB.
MAX_METADATA_BYTES = 16 * 2**20
MAX_METADATA_KEYS = 1000
# What a graph without layers, and one layer, have at most: tests/test_hostile_files.py compares.
MAX_NODES, MAX_NODES_PER_LAYER = 140, 60
# Of a node; Loop takes an LSTM's two states and its rounded one of every layer.
_MAX_INPUTS, _MAX_INPUTS_PER_LAYER = 8, 3
_IR_VERSION = 8
_OPSETS = {"": 17, "com.microsoft": 1}
_MAX_RANK = 3
# Weights in 4 or 8 bits come in blocks of as many rows, see train/export/quantize.py.
_BLOCK = 32

# TensorProto.DataType -> name and bytes an element.
_TYPES = {1: ("f32", 4), 2: ("u8", 1), 3: ("i8", 1), 7: ("i64", 8), 9: ("bool", 1), 10: ("f16", 2), 11: ("f64", 8)}
_DTYPES = {"f4": "f32", "u1": "u8", "i1": "i8", "i8": "i64", "b1": "bool", "f2": "f16", "f8": "f64"}
_INT64 = 7

# The fields that a message of ours has, by their numbers in onnx.proto.
_MODEL = {1, 2, 3, 7, 8, 14}  # ir_version, producer_name, producer_version, graph, opset_import, metadata_props
_GRAPH = {1, 2, 5, 11, 12}  # node, name, initializer, input, output
_NODE = {1, 2, 4, 5, 7}  # input, output, op_type, attribute, domain
_ATTRIBUTE = {1, 2, 3, 5, 6, 8, 20}  # name, f, i, t, g, ints, type
_TENSOR = {1, 2, 8, 9}  # dims, data_type, name, raw_data
_ZERO = {1, 2, 7, 8}  # of ConstantOfShape's value, which has int64_data
# AttributeProto.AttributeType -> the field that holds the value: FLOAT, INT, TENSOR, GRAPH, INTS.
_VALUES = {1: 2, 2: 3, 4: 5, 5: 6, 7: 8}
# Attributes that follow from a matrix's shape, and so differ from file to file.
_SIZES = {"K", "N", "hidden_size"}

_LAYER = re.compile(r"^(layer|loop_state|loop_steps|recurrent|input|[WRB])(0|[1-9]\d*)")


@dataclass(frozen=True)
class Outline:
    """What a file holds, as far as its headers tell. size: of the file, in bytes. graph: where it lies."""

    reader: Reader
    size: int
    metadata: dict[str, str]
    graph: Span


@dataclass(frozen=True)
class Sizes:
    """The sizes by which every shape in a file is known."""

    rnn: str
    vocab_size: int
    hidden_dim: int
    num_layers: int
    document_end: int | None

    def __str__(self) -> str:
        return f"the {self.rnn} of its metadata ({self.num_layers} x {self.hidden_dim}, {self.vocab_size} symbols)"

    @property
    def gates(self) -> int:
        """G."""
        return {"GRU": 3, "LSTM": 4}[self.rnn] * self.hidden_dim


def outline(data: bytes) -> Outline:
    """The metadata of an ONNX file, not empty. Raises: DamagedError, UnsafeError."""
    reader = Reader(data)
    model = reader.fields((0, len(data)), _MODEL, "model")
    graph = reader.one(model, 7)
    if graph is None:
        raise DamagedError("it has no graph")
    spans = [span(pair) for pair in model.get(14, [])]
    if len(spans) > MAX_METADATA_KEYS or sum(end - start for start, end in spans) > MAX_METADATA_BYTES:
        raise UnsafeError(f"its metadata takes more than {MAX_METADATA_BYTES // 2**20} MiB or {MAX_METADATA_KEYS} keys")
    metadata: dict[str, str] = {}
    for pair in spans:
        fields = reader.fields(pair, {1, 2}, "metadata entry")
        key, value = reader.text(fields, 1), reader.text(fields, 2)
        if key in metadata:
            raise UnsafeError(f"its metadata has {key[:40]!r} twice")
        metadata[key] = value
    if "charrnn.format_version" in metadata:  # of other files it is said what they are, not what they have
        _check_versions(reader, model)
    return Outline(reader, len(data), metadata, span(graph))


def _check_versions(reader: Reader, model: Fields) -> None:
    if (version := reader.number(model, 1)) != _IR_VERSION:
        raise UnsafeError(f"it is written in ONNX's IR version {version}")
    for value in model.get(8, []):
        opset = reader.fields(span(value), {1, 2}, "set of operators")
        domain, version = reader.text(opset, 1), reader.number(opset, 2)
        if _OPSETS.get(domain) != version:
            raise UnsafeError(f"it needs version {version} of the operators {domain[:80]!r}")


def check_graph(found: Outline, sizes: Sizes) -> None:
    """Refuses a graph that has any part that charrnn does not write. Raises: DamagedError, UnsafeError."""
    _Graphs(found.reader, sizes).check(found.graph)


class _Graphs:
    """The check of one file's graph and those inside it."""

    def __init__(self, reader: Reader, sizes: Sizes) -> None:
        self._reader, self._sizes = reader, sizes
        self._constants = _constants(sizes)
        # Weights, by name: their element type, and their dimensions.
        self._weights: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._num_nodes = 0

    def check(self, message: Span) -> None:
        """The main graph."""
        graph = self._reader.fields(message, _GRAPH, "graph")
        for value in graph.get(5, []):
            self._read_weight(span(value))
        for name in self._weights:
            self._check_shape(name)
        self._graph(graph, "main", {})

    # ---- weights

    def _read_weight(self, message: Span) -> None:
        """Takes a weight's type and shape, whose every byte must lie in the file; a constant's value must be ours."""
        reader = self._reader
        tensor = reader.fields(message, _TENSOR | {13, 14}, "tensor")
        name = reader.text(tensor, 8)
        shown = repr(name[:80])
        if 13 in tensor or 14 in tensor:
            raise UnsafeError(f"its weights {shown} lie in another file")
        kind = reader.one(tensor, 2)
        if not isinstance(kind, int) or kind not in _TYPES:
            raise UnsafeError(f"its weights {shown} are of type {kind}")
        if name in self._weights:
            raise UnsafeError(f"it has the weights {shown} twice")
        dims = tuple(islice(reader.packed(tensor.get(1, [])), _MAX_RANK + 1))
        if len(dims) > _MAX_RANK:
            raise UnsafeError(f"it has a tensor of more than {_MAX_RANK} dimensions")
        raw = reader.one(tensor, 9)
        start, end = (0, 0) if raw is None else span(raw)
        size = _TYPES[kind][1]
        for dim in dims:
            size *= dim
        if size != end - start:
            shape = " x ".join(map(str, dims)) or "()"
            raise UnsafeError(f"its weights {shown} of shape {shape} have {end - start} bytes in the file")
        self._weights[name] = (_TYPES[kind][0], dims)
        expected = self._constants.get(name)
        if expected is not None and (
            self._weights[name] != (_DTYPES[expected.dtype.str[1:]], expected.shape)
            or reader.data[start:end] != expected.tobytes()
        ):
            raise UnsafeError(f"its constant {shown} is not that of {self._sizes}")

    def _check_shape(self, name: str) -> None:
        """Weights have the shapes that the model's sizes give them."""
        if name in self._constants:
            return
        kind, dims = self._weights[name]
        shown = repr(name[:80])
        shapes = self._shapes(name)
        if shapes is None:
            raise UnsafeError(f"it has weights called {shown}")
        if (kind, dims) not in shapes:
            shape = " x ".join(map(str, dims)) or "()"
            raise UnsafeError(f"its weights {shown} are {kind} of shape {shape}, which is not that of {self._sizes}")

    def _shapes(self, name: str) -> set[tuple[str, tuple[int, ...]]] | None:
        """The types and shapes that weights of that name may have; None for a name that there is not."""
        h, g = self._sizes.hidden_dim, self._sizes.gates
        if name == "head_weight":  # these two of format version 1
            return {("f32", (h, self._sizes.vocab_size))}
        if name[:1] in ("W", "R", "B") and self._is_layer(name[1:]):
            rows = self._embedding_dim() if name == "W0" else h
            return {("f32", (1, 2 * g) if name[0] == "B" else (1, g, rows))}
        stem, _, part = name.partition("_")
        size = self._matrix_size(stem)
        if size is None:
            return None
        rows, columns = size
        blocks = -(-rows // _BLOCK)
        if not part:
            if stem in ("table", "embedding"):
                return {("f32", size), ("f16", size)}
            return {("f32", size), ("i8", size), *(("u8", (columns, blocks, _BLOCK * bits // 8)) for bits in (4, 8))}
        if stem in ("table", "embedding") or part not in ("bias", "shift", "scale"):
            return None
        is_packed = part == "scale" and self._weights.get(stem, ("", ()))[0] == "u8"
        return {("f32", (columns * blocks if is_packed else columns,))}

    def _matrix_size(self, name: str) -> tuple[int, int] | None:
        """(K, N) of the matrix of that name; None for a name that there is not."""
        v, h, g = self._sizes.vocab_size, self._sizes.hidden_dim, self._sizes.gates
        if name in ("table", "head"):
            return (v, g) if name == "table" else (h, v)
        if name == "embedding":
            return v, self._embedding_dim()
        if name.startswith("recurrent") and self._is_layer(name.removeprefix("recurrent")):
            return h, g
        if name.startswith("input") and self._is_layer(name.removeprefix("input")):
            return self._embedding_dim() if name == "input0" else h, g
        return None

    def _embedding_dim(self) -> int:
        """E, which only the embedding itself tells for sure."""
        dims = self._weights.get("embedding", ("", ()))[1]
        if len(dims) != 2 or not dims[1]:
            raise UnsafeError("it has no embedding (V, E)")
        return dims[1]

    def _is_layer(self, text: str) -> bool:
        return text.isascii() and text.isdigit() and text == str(int(text[:9])) and int(text) < self._sizes.num_layers

    # ---- nodes

    def _graph(self, graph: Fields, place: str, outer: dict[str, str]) -> None:
        """Checks a graph's nodes in their order. outer: what gives each value of the graphs around it."""
        reader = self._reader
        if place != "main" and 5 in graph:
            raise UnsafeError("it has weights within a branch or a loop")
        # A value's name -> what gives it.
        givers = {name: _outer(giver) for name, giver in outer.items()}
        own: dict[str, str] = {}
        if place == "main":
            own = {name: self._form_of_weight(name) for name in self._weights}
        for value in graph.get(11, []):
            name = self._declared(span(value))
            if name not in own:
                self._define(own, givers, name, _layerless(name))
        for value in graph.get(1, []):
            self._num_nodes += 1
            if self._num_nodes > MAX_NODES + MAX_NODES_PER_LAYER * self._sizes.num_layers:
                raise UnsafeError(f"it has more nodes than {self._sizes.num_layers} layers take")
            self._node(reader.fields(span(value), _NODE, "node"), place, own, givers)
        outputs = [self._declared(span(value)) for value in graph.get(12, [])]
        given = [self._giver(name, own, givers) for name in outputs]
        self._check_form(f"{place} gives {_listed('Loop' if len(given) > 2 else '', given)}")

    def _declared(self, message: Span) -> str:
        """The name of a graph's input or output, whose type and shape onnxruntime checks."""
        reader = self._reader
        value = reader.fields(message, {1, 2}, "value")
        kind = reader.fields(span(reader.one(value, 2)), {1}, "type")
        tensor = reader.fields(span(reader.one(kind, 1)), {1, 2}, "type")
        shape = reader.fields(span(reader.one(tensor, 2)), {1}, "shape") if 2 in tensor else {}
        if len(shape.get(1, [])) > _MAX_RANK:
            raise UnsafeError(f"it has a tensor of more than {_MAX_RANK} dimensions")
        for dim in shape.get(1, []):
            reader.fields(span(dim), {1, 2}, "dimension")
        return reader.text(value, 1)

    def _form_of_weight(self, name: str) -> str:
        if name in self._constants:
            return name
        return f"{_layerless(name)} {self._weights[name][0]}"

    def _giver(self, name: str, own: dict[str, str], givers: dict[str, str]) -> str:
        if not name:
            return "-"
        giver = own.get(name) or givers.get(name)
        if giver is None:
            raise DamagedError(f"nothing gives the value {name[:80]!r}")
        return giver

    def _define(self, own: dict[str, str], givers: dict[str, str], name: str, giver: str) -> None:
        if name in own or name in givers or not name:
            raise DamagedError(f"two things give the value {name[:80]!r}")
        own[name] = giver

    def _node(self, node: Fields, place: str, own: dict[str, str], givers: dict[str, str]) -> None:
        """Checks that a node is joined to others as one of ours."""
        reader = self._reader
        domain, operator = reader.text(node, 7), reader.text(node, 4)
        if f"{domain} {operator}" not in OPERATORS:
            raise UnsafeError(f"it has the operator {f'{domain} {operator}'.strip()[:80]!r}")
        inputs, outputs = reader.texts(node, 1), reader.texts(node, 2)
        if max(len(inputs), len(outputs)) > _MAX_INPUTS + _MAX_INPUTS_PER_LAYER * self._sizes.num_layers:
            raise UnsafeError(f"it has an operator {operator} with {len(inputs)} inputs and {len(outputs)} outputs")
        taken = [self._giver(name, own, givers) for name in inputs]
        attributes: dict[str, Fields] = {}
        for value in node.get(5, []):
            attribute = reader.fields(span(value), _ATTRIBUTE, "attribute")
            name = reader.text(attribute, 1)
            if name in attributes:
                raise DamagedError(f"an operator {operator} has the attribute {name[:80]!r} twice")
            attributes[name] = attribute
        shown = []
        for name, attribute in sorted(attributes.items()):
            if name in _SIZES:
                self._check_size(name, attribute, inputs)
            elif (inner := self._value(attribute)) is None:
                shown.append(name)
            else:
                shown.append(f"{name}={inner}")
        count = "L" if taken[1:] == ["one_each"] or operator == "Loop" else str(len(outputs))
        known = ", ".join(shown)
        # The form comes first, so that what no file of ours has inside it is not walked through.
        self._check_form(f"{place} {domain} {operator}({_listed(operator, taken)}) -> {count} {known}".rstrip())
        around = givers | own
        for name, attribute in attributes.items():
            if 6 in attribute:
                inside = reader.fields(span(reader.one(attribute, 6)), _GRAPH, "graph")
                self._graph(inside, f"{place}/{operator}.{name}", around)
        for i, name in enumerate(outputs):
            self._define(own, givers, name, f"{operator}:{min(i, 3)}")

    def _value(self, attribute: Fields) -> str | None:
        """An attribute's value as a form shows it; None for a graph."""
        reader = self._reader
        kind = reader.number(attribute, 20)
        field = _VALUES.get(kind)
        if field is None or attribute.keys() - {1, 20, field}:
            raise UnsafeError(f"it has an attribute of type {kind}")
        if field == 6:
            return None
        if field == 5:
            zero = reader.fields(span(reader.one(attribute, 5)), _ZERO, "tensor")
            return f"{reader.number(zero, 2)}:{_numbers(reader, zero, 1)}:{_numbers(reader, zero, 7)}"
        if field == 8:
            return _numbers(reader, attribute, 8)
        return str(reader.number(attribute, field))

    def _check_size(self, name: str, attribute: Fields, inputs: list[str]) -> None:
        """K and N are those of the matrix that is multiplied with, hidden_size is H."""
        size = self._sizes.hidden_dim
        if name != "hidden_size":
            matrix = self._matrix_size(inputs[1]) if len(inputs) > 1 else None
            size = 0 if matrix is None else matrix["KN".index(name)]
        if self._value(attribute) != str(size):
            raise UnsafeError(f"it has an operator with {name} {self._value(attribute)}")

    def _check_form(self, form: str) -> None:
        if form not in FORMS and form not in EARLIER:
            raise UnsafeError(f"its graph has {form[:120]!r}")


def _numbers(reader: Reader, fields: Fields, number: int) -> str:
    values = list(islice(reader.packed(fields.get(number, [])), _MAX_RANK + 1))
    return " ".join(map(str, values))


def _layerless(name: str) -> str:
    """A name without the number of its layer, save that of input0, which reads embeddings."""
    return name if name.startswith("input0") else _LAYER.sub(r"\1#", name)


def _outer(giver: str) -> str:
    """A value as graphs inside the one that has it see it."""
    return giver if giver.startswith("^") else f"^{giver}"


def _listed(operator: str, givers: Sequence[str]) -> str:
    """What gives an operator's inputs; of those that come once a layer, the kinds that there are."""
    if operator == "Loop":
        return ", ".join([*givers[:2], *sorted(set(givers[2:]))])
    if operator == "Concat" and len(set(givers)) == 1:
        return givers[0]
    return ", ".join(givers)


def _constants(sizes: Sizes) -> dict[str, NDArray[Any]]:
    """The values that are the same in every file of the same sizes, as train/export/onnx_graph.py names them."""
    h, v = sizes.hidden_dim, sizes.vocab_size
    integers: dict[str, Any] = {
        "axis_0": [0],
        "axis_1": [1],
        "axis_2": [2],
        "far": [2**63 - 1],
        "zero": 0,
        "one": 1,
        "minus_1": -1,
        "minus_1s": [-1],
        "minus_1_width": [-1, h],
        "one_each": [1] * sizes.num_layers,
        "two_widths": [h] * 2,
        "three_widths": [h] * 3,
        "switches_candidate": [sizes.gates - h, h],
        "all_symbols": v,
        "top_k": 0,
    }
    doubles: dict[str, Any] = {"zero_f64": 0, "one_f64": 1, "least_temperature": 1e-200}
    doubles |= {"uniforms": np.zeros((1, 0)), "temperature": 1, "top_p": 1, "min_p": 0}
    floats: dict[str, Any] = {"minus_infinity": -np.inf, "state_scale": 1 / 127, "no_scale": 1, "one_gains": [1] * h}
    found: dict[str, NDArray[Any]] = {name: np.array(value, np.int64) for name, value in integers.items()}
    found |= {name: np.array(value, np.float64) for name, value in doubles.items()}
    found |= {name: np.array(value, np.float32) for name, value in floats.items()}
    found |= {"true": np.array(True), "state_middle": np.array(128, np.uint8)}
    if sizes.document_end is not None:
        found["goes_on"] = (np.arange(v) != sizes.document_end).astype(np.float32)[:, None]
    return found
