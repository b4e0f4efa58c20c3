"""A thin builder over onnx.helper: `op.Add(x, y)` appends a node and returns the name of its output.

onnxscript's GraphBuilder (0.7) has the same form. It writes node names and scopes into every node, which the reader's
allow-list would then have to strip, and its API is young; these few lines need onnx alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx
from onnx import TensorProto, helper

Shape = Sequence[str | int | None]
# (name, element type, shape) -> the declaration of an input or output; a dimension is fixed, named or (None) any.
tensor = helper.make_tensor_value_info


class GraphBuilder:
    """The nodes of one graph or subgraph, whose values are named after `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.quantized: dict[str, str] = {}  # a float state -> the same in 8 bits
        self._prefix = prefix

    def __getattr__(self, op_type: str) -> Callable[..., str]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return partial(self._one, op_type)

    def _one(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        if not name:
            return self.multiple(op_type, inputs, 1, **attributes)[0]
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def multiple(self, op_type: str, inputs: Sequence[str], num_outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs and returns their names."""
        outputs = [f"{self._prefix}{op_type}_{len(self.nodes)}_{i}" for i in range(num_outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, **attributes))
        return outputs

    def graph(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """Return the nodes as a graph."""
        return helper.make_graph(self.nodes, self._prefix.rstrip("_") or "charrnn", list(inputs), list(outputs))


def branch(
    prefix: str, build: Callable[[GraphBuilder], Sequence[str]], *types: tuple[int, Shape | None]
) -> onnx.GraphProto:
    """Return a branch of an If: `build` adds its nodes and returns its outputs, of these element types and shapes."""
    op = GraphBuilder(prefix)
    outputs = build(op)
    return op.graph([], [tensor(name, *kind) for name, kind in zip(outputs, types, strict=True)])


def optional_tensor(name: str, elem_type: int, shape: Shape) -> onnx.ValueInfoProto:
    """Return the declaration of a graph input that a caller may leave out."""
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(elem_type, shape))
    return helper.make_value_info(name, kind)


def float32(name: str, *shape: str | int | None) -> onnx.ValueInfoProto:
    """`tensor` of float32."""
    return tensor(name, TensorProto.FLOAT, shape)


def int64(name: str, *shape: str | int | None) -> onnx.ValueInfoProto:
    """`tensor` of int64."""
    return tensor(name, TensorProto.INT64, shape)


def values_read(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all values that the nodes of a graph, and of the graphs inside it, take."""
    found: set[str] = set()
    for node in graph.node:
        found |= set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= values_read(attribute.g)
    return found
