"""How the nodes of an ONNX graph are joined: a digest of every node with its neighbours."""

import hashlib
import re
from collections.abc import Sequence

from infer.model_file.layout import Sizes
from infer.model_file.protobuf import DamagedError, Message, UnsafeError

# The most that a graph has apart from its layers, and per layer: tests/test_hostile_files.py compares.
MAX_NODES, MAX_NODES_PER_LAYER = 160, 60
# Of a node; Loop takes an LSTM's two states and its quantized one of every layer.
_MAX_INPUTS, _MAX_INPUTS_PER_LAYER = 8, 3
# AttributeProto.AttributeType -> the field that holds the value.
_VALUES = {1: "f", 2: "i", 4: "t", 5: "g", 7: "ints"}

_LAYER = re.compile(r"^(layer|loop_state|loop_quantized|recurrent|input)(0|[1-9]\d*)")


def structure_digest(graph: Message, weights: dict[str, str], sizes: Sizes) -> str:
    """Return a digest of how a graph's nodes are joined, the same for every number of layers above 1.

    It is taken over the set of all nodes' forms, and what each graph takes and gives. A form is the graph that a node
    is in, its operator, what gives each of its inputs, its number of outputs and its attributes. Numbers of layers are
    #, ^ marks a value of an outer graph.

    Raises:
        DamagedError, UnsafeError: for what no graph of charrnn's has, whatever the rest.
    """
    structure = _Structure(weights, sizes)
    structure.add_graph(graph, "main", {})
    return hashlib.blake2b(repr(sorted(structure.forms)).encode(), digest_size=16).hexdigest()


class _Structure:
    """The forms of the nodes of a graph and of those inside it."""

    def __init__(self, weights: dict[str, str], sizes: Sizes) -> None:
        self.forms: set[str] = set()
        self._weights, self._layers = weights, sizes.num_layers
        self._num_nodes = 0

    def add_graph(self, graph: Message, place: str, outer: dict[str, str]) -> None:
        """Add a graph's nodes. outer: what gives each value of the graphs around it."""
        if place != "main" and graph["initializer"]:
            raise UnsafeError("it has weights within a branch or a loop")
        # A value's name -> what gives it.
        givers = {name: giver if giver.startswith("^") else f"^{giver}" for name, giver in outer.items()}
        own = dict(self._weights) if place == "main" else {}
        for value in graph["input"]:
            _define(own, givers, value["name"], layerless(value["name"]))
        self.forms.add(f"{place} takes {sorted({layerless(value['name']) for value in graph['input']})}")
        for node in graph["node"]:
            self._num_nodes += 1
            if self._num_nodes > MAX_NODES + MAX_NODES_PER_LAYER * self._layers:
                raise UnsafeError(f"it has more nodes than {self._layers} layers take")
            self._add_node(node, place, own, givers)
        given = [_giver(value["name"], own, givers) for value in graph["output"]]
        self.forms.add(f"{place} gives {_listed('Loop' if place.endswith('Loop.body') else '', given)}")

    def _add_node(self, node: Message, place: str, own: dict[str, str], givers: dict[str, str]) -> None:
        operator = ".".join(filter(None, [node["domain"], node["op_type"]]))
        inputs, outputs = node["input"], node["output"]
        if max(len(inputs), len(outputs)) > _MAX_INPUTS + _MAX_INPUTS_PER_LAYER * self._layers:
            raise UnsafeError(f"it has an operator {operator} with {len(inputs)} inputs and {len(outputs)} outputs")
        taken = [_giver(name, own, givers) for name in inputs]
        attributes = {attribute["name"]: attribute for attribute in node["attribute"]}
        if len(attributes) < len(node["attribute"]):
            raise DamagedError(f"an operator {operator} has an attribute twice")
        shown = [f"{name}={_value(attributes[name])}" for name in sorted(attributes)]
        per_layer = operator == "Loop" or taken[1:] == ["one_each"]
        count = "L" if per_layer else len(outputs)
        self.forms.add(f"{place} {operator}({_listed(operator, taken)}) -> {count} {', '.join(shown)}")
        for name, attribute in attributes.items():
            if attribute["g"]:
                self.add_graph(attribute["g"], f"{place}/{operator}.{name}", givers | own)
        for i, name in enumerate(outputs):
            _define(own, givers, name, f"{operator}:{'#' if i and per_layer else i}")


def _value(attribute: Message) -> str:
    """Return an attribute's value as a form shows it."""
    field = _VALUES.get(attribute["type"])
    if field is None or any(attribute[other] for other in _VALUES.values() if other != field):
        raise UnsafeError(f"it has an attribute of type {attribute['type']}")
    value = attribute[field]
    if value is None:
        raise DamagedError("an attribute has no value")
    if field == "t":
        return f"{value['data_type']}:{_spaced(value['dims'])}:{_spaced(value['int64_data'])}"
    if field == "f":
        return str(int.from_bytes(value, "little"))
    return "graph" if field == "g" else _spaced(value) if field == "ints" else str(value)


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


def _spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


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
