"""Inspection of an ONNX file before onnxruntime opens it: what charrnn's export does not write is refused unrun.

onnxruntime reads other files that a model points to, allocates what a model declares, and believes its numbers; some
graphs end its process. So a file must consist of the parts that train.export writes and of nothing else: these
protobuf fields, these weights in these shapes, these constants with these values, and a graph whose structure has one
of the digests in `graph_digests`. It needs no package for ONNX; weights stay unread.
Source: onnx.proto (IR version 8). Letters: V, E, H, L as in docs/model-file.md.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from infer.model_file.graph_digests import DIGESTS
from infer.model_file.layout import Sizes, constants
from infer.model_file.protobuf import DamagedError, Fields, Reader, Span, UnsafeError, span

# protobuf's own limit for a message, and so onnxruntime's for a file.
MAX_FILE_BYTES = 2**31 - 1
# A vocabulary of every Unicode character takes 11 MiB.
MAX_METADATA_BYTES = 16 * 2**20
MAX_METADATA_KEYS = 1000
# The most that a graph has apart from its layers, and per layer: tests/test_hostile_files.py compares.
MAX_NODES, MAX_NODES_PER_LAYER = 190, 60
# Of a node; Loop takes an LSTM's two states and its quantized one of every layer.
_MAX_INPUTS, _MAX_INPUTS_PER_LAYER = 8, 3
_MAX_DEPTH = 3  # of graphs within graphs
_MAX_RANK = 3
_IR_VERSION = 8
_OPSETS = {"": 17, "com.microsoft": 1}
_OPERATORS = frozenset(
    re.findall(
        r"\S+",
        """
        Add And ArgMax Cast Concat ConstantOfShape CumSum Div Exp Gather Greater GreaterOrEqual Identity If
        LayerNormalization Less Loop MatMul Max Min Mul Not OptionalGetElement OptionalHasElement Or QuantizeLinear
        ReduceMax ReduceMin Reshape ScatterElements Scan Shape Sigmoid Slice Softmax Split Squeeze Sub Tanh TopK
        Transpose Unsqueeze Where com.microsoft.MatMulIntegerToFloat
        """,
    )
)

# TensorProto.DataType -> name and bytes an element.
_TYPES = {1: ("f32", 4), 2: ("u8", 1), 3: ("i8", 1), 7: ("i64", 8), 9: ("bool", 1), 10: ("f16", 2), 11: ("f64", 8)}
_DTYPES = {"f4": "f32", "u1": "u8", "i1": "i8", "i8": "i64", "b1": "bool", "f2": "f16", "f8": "f64"}

# The fields that a message of ours has, by their numbers in onnx.proto.
_MODEL = {1, 2, 3, 7, 8, 14}  # ir_version, producer_name, producer_version, graph, opset_import, metadata_props
_GRAPH = {1, 2, 5, 11, 12}  # node, name, initializer, input, output
_NODE = {1, 2, 4, 5, 7}  # input, output, op_type, attribute, domain
_ATTRIBUTE = {1, 2, 3, 5, 6, 8, 20}  # name, f, i, t, g, ints, type
_TENSOR = {1, 2, 8, 9}  # dims, data_type, name, raw_data
_ZERO = {1, 2, 7, 8}  # of ConstantOfShape's value, which has int64_data
# AttributeProto.AttributeType -> the field that holds the value: FLOAT, INT, TENSOR, GRAPH, INTS.
_VALUES = {1: 2, 2: 3, 4: 5, 5: 6, 7: 8}

_LAYER = re.compile(r"^(layer|loop_state|loop_quantized|recurrent|input)(0|[1-9]\d*)")

Shape = tuple[int, ...]
_Tensor = tuple[str, Shape, Span]  # element type, shape and where the data lies


@dataclass(frozen=True)
class Outline:
    """What a file's headers hold.

    Attributes:
        reader: Of its bytes.
        size: In bytes.
        metadata: Key -> value.
        graph: Where the graph lies.
    """

    reader: Reader
    size: int
    metadata: dict[str, str]
    graph: Span


def outline(data: bytes) -> Outline:
    """Read the metadata of an ONNX file, not empty.

    Raises:
        DamagedError, UnsafeError: for bytes that are no ONNX file, or one that charrnn does not write.
    """
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
    if "charrnn.format_version" in metadata:  # another program's file is reported as such, whatever it needs
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
    """Refuse a graph that has any part that charrnn does not write.

    Raises:
        DamagedError, UnsafeError: with the part.
    """
    graph = found.reader.fields(found.graph, _GRAPH, "graph")
    weights = _read_weights(found.reader, graph, sizes)
    if structure_digest(found.reader, graph, weights, sizes) not in DIGESTS:
        raise UnsafeError("its graph is joined otherwise than those that charrnn writes")


# ---- weights


def _read_weights(reader: Reader, graph: Fields, sizes: Sizes) -> dict[str, str]:
    """Check every weight's name, type and shape, and every constant's value.

    Returns:
        name -> what the structure calls it: a constant by its name, others with their element type.
    """
    expected = constants(sizes)
    tensors: dict[str, _Tensor] = {}
    for value in graph.get(5, []):
        name, tensor = _read_tensor(reader, span(value))
        if name in tensors:
            raise UnsafeError(f"it has the weights {name[:80]!r} twice")
        tensors[name] = tensor
    embedding = tensors.get("embedding", ("", (0, 0)))[1]
    embedding_dim = embedding[1] if len(embedding) == 2 else 0
    for name, (kind, dims, (start, end)) in tensors.items():
        if (array := expected.get(name)) is not None:
            same_type = (kind, dims) == (_DTYPES[array.dtype.str[1:]], array.shape)
            if not same_type or reader.data[start:end] != array.tobytes():
                raise UnsafeError(f"its constant {name[:80]!r} is not that of {sizes}")
        elif (shape := _weight_shape(name, sizes, embedding_dim)) is None:
            raise UnsafeError(f"it has weights called {name[:80]!r}")
        elif shape != dims or kind not in ("f32", "f16", "i8", "u8"):
            raise UnsafeError(f"its weights {name!r} are {kind} of shape {_shown(dims)}, which is not that of {sizes}")
    return {name: name if name in expected else f"{_layerless(name)} {tensors[name][0]}" for name in tensors}


def _read_tensor(reader: Reader, message: Span) -> tuple[str, _Tensor]:
    """Return a tensor's name, element type, shape and where its data lies, all of which must be in the file."""
    tensor = reader.fields(message, _TENSOR | {13, 14}, "tensor")
    name = reader.text(tensor, 8)
    shown = repr(name[:80])
    if 13 in tensor or 14 in tensor:
        raise UnsafeError(f"its weights {shown} lie in another file")
    kind = reader.one(tensor, 2)
    if not isinstance(kind, int) or kind not in _TYPES:
        raise UnsafeError(f"its weights {shown} are of type {kind}")
    dims = tuple(islice(reader.packed(tensor.get(1, [])), _MAX_RANK + 1))
    if len(dims) > _MAX_RANK:
        raise UnsafeError(f"it has a tensor of more than {_MAX_RANK} dimensions")
    raw = reader.one(tensor, 9)
    start, end = (0, 0) if raw is None else span(raw)
    name_of_type, size = _TYPES[kind]
    for dim in dims:
        size *= dim
    if size != end - start:
        raise UnsafeError(f"its weights {shown} of shape {_shown(dims)} have {end - start} bytes in the file")
    return name, (name_of_type, dims, (start, end))


def _weight_shape(name: str, sizes: Sizes, embedding_dim: int) -> Shape | None:
    """Return the shape of a weight of that name; None for a name that no file has."""
    v, h, g, e = sizes.vocab_size, sizes.hidden_dim, sizes.gates, embedding_dim
    matrix, _, part = name.partition("_")
    shapes = {"table": (v, g), "embedding": (v, e), "input0": (e, g), "head": (h, v)}
    layer = re.fullmatch(r"(recurrent|input)(0|[1-9]\d{0,8})", matrix)
    if layer and int(layer[2]) < sizes.num_layers:
        shapes = {matrix: (h, g)} | shapes
    shape = shapes.get(matrix)
    if shape is None or not part:
        return shape
    return shape[1:] if part in ("bias", "shift", "scale") and matrix not in ("table", "embedding") else None


def _shown(dims: Shape) -> str:
    return " x ".join(map(str, dims)) or "()"


# ---- structure


def structure_digest(reader: Reader, graph: Fields, weights: dict[str, str], sizes: Sizes) -> str:
    """Return a digest of how a graph's nodes are joined, the same for every number of layers above 1.

    It is taken over the set of all nodes' forms. A form is the graph that a node is in, its operator, what gives each
    of its inputs, its number of outputs and its attributes. Numbers of layers are #, ^ marks a value of an outer graph.

    Raises:
        DamagedError, UnsafeError: for what no graph of charrnn's has, whatever the rest.
    """
    structure = _Structure(reader, weights, sizes)
    structure.add_graph(graph, "main", {})
    return hashlib.blake2b("\n".join(sorted(structure.forms)).encode(), digest_size=16).hexdigest()


class _Structure:
    """The forms of the nodes of a graph and of those inside it."""

    def __init__(self, reader: Reader, weights: dict[str, str], sizes: Sizes) -> None:
        self.forms: set[str] = set()
        self._reader, self._weights, self._layers = reader, weights, sizes.num_layers
        self._num_nodes = 0

    def add_graph(self, graph: Fields, place: str, outer: dict[str, str]) -> None:
        """Add a graph's nodes. outer: what gives each value of the graphs around it."""
        reader = self._reader
        if place != "main" and 5 in graph:
            raise UnsafeError("it has weights within a branch or a loop")
        # A value's name -> what gives it.
        givers = {name: giver if giver.startswith("^") else f"^{giver}" for name, giver in outer.items()}
        own = dict(self._weights) if place == "main" else {}
        for value in graph.get(11, []):
            name = self._declared(span(value))
            _define(own, givers, name, _layerless(name))
        for value in graph.get(1, []):
            self._num_nodes += 1
            if self._num_nodes > MAX_NODES + MAX_NODES_PER_LAYER * self._layers:
                raise UnsafeError(f"it has more nodes than {self._layers} layers take")
            self._add_node(reader.fields(span(value), _NODE, "node"), place, own, givers)
        outputs = [self._declared(span(value)) for value in graph.get(12, [])]
        given = [_giver(name, own, givers) for name in outputs]
        self.forms.add(f"{place} gives {_listed('Loop' if place.endswith('Loop.body') else '', given)}")

    def _declared(self, message: Span) -> str:
        """Return the name of a graph's input or output, whose type and shape onnxruntime checks."""
        reader = self._reader
        value = reader.fields(message, {1, 2}, "value")
        kind = reader.fields(span(reader.one(value, 2)), {1, 9}, "type")
        if 9 in kind:  # an optional input
            optional = reader.fields(span(reader.one(kind, 9)), {1}, "type")
            kind = reader.fields(span(reader.one(optional, 1)), {1}, "type")
        tensor = reader.fields(span(reader.one(kind, 1)), {1, 2}, "type")
        shape = reader.fields(span(reader.one(tensor, 2)), {1}, "shape") if 2 in tensor else {}
        if len(shape.get(1, [])) > _MAX_RANK:
            raise UnsafeError(f"it has a tensor of more than {_MAX_RANK} dimensions")
        for dim in shape.get(1, []):
            reader.fields(span(dim), {1, 2}, "dimension")
        return reader.text(value, 1)

    def _add_node(self, node: Fields, place: str, own: dict[str, str], givers: dict[str, str]) -> None:
        reader = self._reader
        operator = ".".join(filter(None, [reader.text(node, 7), reader.text(node, 4)]))
        if operator not in _OPERATORS:
            raise UnsafeError(f"it has the operator {operator[:80]!r}")
        inputs, outputs = reader.texts(node, 1), reader.texts(node, 2)
        if max(len(inputs), len(outputs)) > _MAX_INPUTS + _MAX_INPUTS_PER_LAYER * self._layers:
            raise UnsafeError(f"it has an operator {operator} with {len(inputs)} inputs and {len(outputs)} outputs")
        taken = [_giver(name, own, givers) for name in inputs]
        shown, inside = self._attributes(node, operator)
        per_layer = operator == "Loop" or taken[1:] == ["one_each"]
        count = "L" if per_layer else len(outputs)
        self.forms.add(f"{place} {operator}({_listed(operator, taken)}) -> {count} {', '.join(shown)}")
        if inside and place.count("/") >= _MAX_DEPTH:
            raise UnsafeError(f"it has an operator {operator} more than {_MAX_DEPTH} graphs deep")
        for name, graph in inside.items():
            self.add_graph(graph, f"{place}/{operator}.{name}", givers | own)
        for i, name in enumerate(outputs):
            _define(own, givers, name, f"{operator}:{'#' if i and per_layer else i}")

    def _attributes(self, node: Fields, operator: str) -> tuple[list[str], dict[str, Fields]]:
        """Return how a form shows a node's attributes, and the graphs among them by name."""
        reader = self._reader
        shown: dict[str, str] = {}
        inside: dict[str, Fields] = {}
        for value in node.get(5, []):
            attribute = reader.fields(span(value), _ATTRIBUTE, "attribute")
            name = reader.text(attribute, 1)
            if name in shown:
                raise DamagedError(f"an operator {operator} has the attribute {name[:80]!r} twice")
            shown[name] = f"{name}={self._value(attribute)}"
            if 6 in attribute:
                inside[name] = reader.fields(span(reader.one(attribute, 6)), _GRAPH, "graph")
        return [shown[name] for name in sorted(shown)], inside

    def _value(self, attribute: Fields) -> str:
        """Return an attribute's value as a form shows it."""
        reader = self._reader
        kind = reader.number(attribute, 20)
        field = _VALUES.get(kind)
        if field is None or attribute.keys() - {1, 20, field}:
            raise UnsafeError(f"it has an attribute of type {kind}")
        if field == 6:
            return "graph"
        if field == 5:
            zero = reader.fields(span(reader.one(attribute, 5)), _ZERO, "tensor")
            return f"{reader.number(zero, 2)}:{_numbers(reader, zero, 1)}:{_numbers(reader, zero, 7)}"
        if field == 8:
            return _numbers(reader, attribute, 8)
        return str(reader.number(attribute, field))


def _giver(name: str, own: dict[str, str], givers: dict[str, str]) -> str:
    if not name:
        return "-"
    giver = own.get(name) or givers.get(name)
    if giver is None:
        raise DamagedError(f"nothing gives the value {name[:80]!r}")
    return giver


def _define(own: dict[str, str], givers: dict[str, str], name: str, giver: str) -> None:
    if name in own or name in givers or not name:
        raise DamagedError(f"two things give the value {name[:80]!r}")
    own[name] = giver


def _numbers(reader: Reader, fields: Fields, number: int) -> str:
    return " ".join(map(str, islice(reader.packed(fields.get(number, [])), _MAX_RANK + 1)))


def _layerless(name: str) -> str:
    """Return a name without the number of its layer, except input0's, which reads embeddings."""
    return name if name.startswith("input0") else _LAYER.sub(r"\1#", name)


def _listed(operator: str, givers: Sequence[str]) -> str:
    """List what gives an operator's inputs; of those that come once a layer, each kind once."""
    if operator == "Loop" and len(givers) > 2:
        return ", ".join([*givers[:2], *sorted(set(givers[2:]))])
    if operator == "Concat" and len(set(givers)) == 1:
        return givers[0]
    return ", ".join(givers)
