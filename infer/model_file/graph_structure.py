"""How the nodes of an ONNX graph are joined: a digest of every node with its neighbours.

Source: onnx.proto (IR version 8).
"""

import hashlib
import re
from collections.abc import Sequence
from itertools import islice

from infer.model_file.layout import Sizes
from infer.model_file.protobuf import DamagedError, Fields, Reader, Span, UnsafeError, span

# The most that a graph has apart from its layers, and per layer: tests/test_hostile_files.py compares.
MAX_NODES, MAX_NODES_PER_LAYER = 190, 60
# Of a node; Loop takes an LSTM's two states and its quantized one of every layer.
_MAX_INPUTS, _MAX_INPUTS_PER_LAYER = 8, 3
_MAX_DEPTH = 3  # of graphs within graphs
MAX_RANK = 3
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

# The fields that a message of ours has, by their numbers in onnx.proto.
GRAPH = {1, 2, 5, 11, 12}  # node, name, initializer, input, output
_NODE = {1, 2, 4, 5, 7}  # input, output, op_type, attribute, domain
_ATTRIBUTE = {1, 2, 3, 5, 6, 8, 20}  # name, f, i, t, g, ints, type
_ZERO = {1, 2, 7, 8}  # of ConstantOfShape's value, which has int64_data
# AttributeProto.AttributeType -> the field that holds the value: FLOAT, INT, TENSOR, GRAPH, INTS.
_VALUES = {1: 2, 2: 3, 4: 5, 5: 6, 7: 8}

_LAYER = re.compile(r"^(layer|loop_state|loop_quantized|recurrent|input)(0|[1-9]\d*)")


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
            _define(own, givers, name, layerless(name))
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
        if len(shape.get(1, [])) > MAX_RANK:
            raise UnsafeError(f"it has a tensor of more than {MAX_RANK} dimensions")
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
                inside[name] = reader.fields(span(reader.one(attribute, 6)), GRAPH, "graph")
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
    return " ".join(map(str, islice(reader.packed(fields.get(number, [])), MAX_RANK + 1)))


def layerless(name: str) -> str:
    """Return a name without the number of its layer, except input0's, which reads embeddings."""
    return name if name.startswith("input0") else _LAYER.sub(r"\1#", name)


def _listed(operator: str, givers: Sequence[str]) -> str:
    """List what gives an operator's inputs; of those that come once a layer, each kind once."""
    if operator == "Loop" and len(givers) > 2:
        return ", ".join([*givers[:2], *sorted(set(givers[2:]))])
    if operator == "Concat" and len(set(givers)) == 1:
        return givers[0]
    return ", ".join(givers)
