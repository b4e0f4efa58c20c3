"""A look into an ONNX file before onnxruntime opens it, so that a hostile one is refused without being run.

onnxruntime reads other files that a model points to, allocates what a model declares, and believes its numbers; this
walk over the protobuf refuses what would make use of that. It needs no package for ONNX, and looks at headers only: the
weights' pages are not touched.
Sources: onnx.proto (IR version 8); protobuf's wire format, https://protobuf.dev/programming-guides/encoding/.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

# protobuf's own limit for a message, and so onnxruntime's for a file.
MAX_FILE_BYTES = 2**31 - 1
# A vocabulary of every Unicode character takes 11 MiB.
MAX_METADATA_BYTES = 16 * 2**20
# A layer takes about 1000 fields. Both bound the time that the walk takes.
_MAX_FIELDS = 1_000_000
_MAX_DEPTH = 4
_MAX_RANK = 8

# What train/graph.py writes, and for files of version 1 has written; tests/test_hostile_files.py compares.
_OPERATORS = {
    *("Add", "And", "ArgMax", "Cast", "Concat", "ConstantOfShape", "CumSum", "Div", "Exp", "Gather", "Greater"),
    *("GreaterOrEqual", "GRU", "Identity", "If", "Less", "Loop", "LSTM", "MatMul", "Max", "Min", "Mul"),
    *("Not", "Or", "QuantizeLinear", "ReduceSum", "Reshape", "Scan", "ScatterElements", "Shape", "Sigmoid", "Slice"),
    *("LayerNormalization", "Softmax", "Split", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where"),
}
_CONTRIB_OPERATORS = {"MatMulIntegerToFloat", "MatMulNBits"}
# TensorProto.DataType -> bytes an element: FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, DOUBLE.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}
_INT64 = 7
_TO_THE_END = 2**63 - 1

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_METADATA, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 14, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 6
_ATTRIBUTE_OTHERS = (10, 11, 22, 23)  # lists of tensors and graphs, sparse tensors
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14

_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
_MAX_NUMBER = 2**29  # protobuf's own
# Field number -> the field's values in their order: a number for a varint, else where its bytes begin and end.
_Span = tuple[int, int]
_Fields = dict[int, list[int | _Span]]


class DamagedError(ValueError):
    """The bytes are no ONNX model."""


class UnsafeError(ValueError):
    """An ONNX model asks for what no model file of charrnn asks for."""


@dataclass(frozen=True)
class Outline:
    """What a file holds, as far as a walk over its headers tells. size: of the file, in bytes."""

    path: Path
    size: int
    metadata: dict[str, str]


def read_metadata(path: Path) -> Outline:
    """The metadata of an ONNX file of at most MAX_FILE_BYTES, not empty. Raises: DamagedError, UnsafeError, OSError."""
    with _walk(path) as walk:
        model = walk.fields((0, walk.size))
        spans = [_span(pair) for pair in model.get(_MODEL_METADATA, [])]
        if sum(end - start for start, end in spans) > MAX_METADATA_BYTES:
            raise UnsafeError(f"its metadata takes more than {MAX_METADATA_BYTES // 2**20} MiB")
        metadata: dict[str, str] = {}
        for span in spans:
            pair = walk.fields(span)
            key, value = walk.text(pair, 1), walk.text(pair, 2)
            if key in metadata:
                raise UnsafeError(f"its metadata has {key[:40]!r} twice")
            metadata[key] = value
        return Outline(path, walk.size, metadata)


def check_graph(path: Path) -> None:
    """Refuses a graph with operators, weights or other parts that charrnn does not write. Raises: as read_metadata."""
    with _walk(path) as walk:
        model = walk.fields((0, walk.size))
        if _MODEL_TRAINING in model or _MODEL_FUNCTIONS in model:
            raise UnsafeError("it defines functions of its own")
        graph = walk.one(model, _MODEL_GRAPH)
        if graph is None:
            raise DamagedError("it has no graph")
        walk.graph(_span(graph), 0)


def _walk(path: Path) -> "_Walk":
    with path.open("rb") as file:
        return _Walk(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Walk:
    """Reads messages out of a file's bytes; a message is where its bytes begin and end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.size = len(data)
        self._data = data
        self._num_fields = 0
        # Names of small weights that are all zeros, and of lists of numbers with one of these in them.
        self._zeros: set[str] = set()
        self._with_zero: set[str] = set()

    def __enter__(self) -> "_Walk":
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    # ---- protobuf

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number that begins at `at`, and where the next byte is."""
        value = 0
        for i in range(at, min(at + 10, end)):
            byte = self._data[i]
            value |= (byte & 127) << 7 * (i - at)
            if byte < 128:
                return value, i + 1
        raise DamagedError(f"the number at byte {at} does not end")

    def fields(self, message: _Span) -> _Fields:
        """A message's fields."""
        at, end = message
        data = self._data
        found: _Fields = {}
        while at < end:
            start = at
            tag, at = (data[at], at + 1) if data[at] < 128 else self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                value, at = self._varint(at, end)
                found.setdefault(number, []).append(value)
            elif kind == _BYTES:
                size, at = self._varint(at, end)
                found.setdefault(number, []).append((at, at + size))
                at += size
            elif kind in _FIXED_BYTES:  # floats, none of which matters here
                at += _FIXED_BYTES[kind]
            else:
                raise DamagedError(f"a field of unknown kind at byte {start}")
            if not 0 < number < _MAX_NUMBER or at > end:
                raise DamagedError(f"the field at byte {start} does not end where it should")
            self._num_fields += 1
            if self._num_fields > _MAX_FIELDS:
                raise UnsafeError(f"it has more than {_MAX_FIELDS} parts")
        return found

    def one(self, fields: _Fields, number: int) -> int | _Span | None:
        """The only value of a field; None without one. Twice the same protobuf would merge."""
        values = fields.get(number, [None])
        if len(values) > 1:
            raise DamagedError(f"field {number} is there {len(values)} times")
        return values[0]

    def text(self, fields: _Fields, number: int) -> str:
        """A string field; without one "", protobuf's default."""
        value = self.one(fields, number)
        return "" if value is None else self._decoded(_span(value))

    def texts(self, fields: _Fields, number: int) -> list[str]:
        """A repeated string field."""
        return [self._decoded(_span(value)) for value in fields.get(number, [])]

    def _decoded(self, span: _Span) -> str:
        start, end = span
        try:
            return self._data[start:end].decode()
        except UnicodeDecodeError:
            raise DamagedError(f"text that is not UTF-8 at byte {start}") from None

    def _packed(self, values: list[int | _Span]) -> Iterator[int]:
        """A repeated number, one value a field or many."""
        for value in values:
            if isinstance(value, int):
                yield value
                continue
            at, end = value
            while at < end:
                number, at = self._varint(at, end)
                yield number

    # ---- onnx

    def graph(self, message: _Span, depth: int) -> None:
        """Checks a graph, and those inside it."""
        if depth > _MAX_DEPTH:
            raise UnsafeError(f"its graphs lie more than {_MAX_DEPTH} deep")
        graph = self.fields(message)
        if _GRAPH_SPARSE in graph:
            raise UnsafeError("it has sparse weights")
        for tensor in graph.get(_GRAPH_INITIALIZER, []):
            self._tensor(self.fields(_span(tensor)))
        for node in graph.get(_GRAPH_NODE, []):
            self._node(self.fields(_span(node)), depth)

    def _node(self, node: _Fields, depth: int) -> None:
        operator, domain = self.text(node, _NODE_OPERATOR), self.text(node, _NODE_DOMAIN)
        known = {"": _OPERATORS, "ai.onnx": _OPERATORS, "com.microsoft": _CONTRIB_OPERATORS}.get(domain, set())
        if operator not in known:
            raise UnsafeError(f"it has the operator {f'{domain} {operator}'.strip()[:80]!r}")
        for value in node.get(_NODE_ATTRIBUTE, []):
            attribute = self.fields(_span(value))
            if any(number in attribute for number in _ATTRIBUTE_OTHERS):
                raise UnsafeError(f"its operator {operator} has a list of tensors or graphs")
            inner, tensor = self.one(attribute, _ATTRIBUTE_GRAPH), self.one(attribute, _ATTRIBUTE_TENSOR)
            if inner is not None:
                self.graph(_span(inner), depth + 1)
            if tensor is not None:
                constant = self.fields(_span(tensor))
                self._no_external_data(constant, f"of operator {operator}")
                if math.prod(self._dims(constant)) != 1:
                    raise UnsafeError(f"its operator {operator} has a tensor of more than one element")
        if operator in ("Concat", "ConstantOfShape"):
            self._only_empty_constants(operator, self.texts(node, _NODE_INPUT), self.texts(node, _NODE_OUTPUT))

    def _only_empty_constants(self, operator: str, inputs: list[str], outputs: list[str]) -> None:
        """ConstantOfShape may make tensors of any size; charrnn's are of no characters, with a 0 among the sizes."""
        if operator == "Concat" and not self._zeros.isdisjoint(inputs):
            self._with_zero.update(outputs)
        if operator == "ConstantOfShape" and not self._with_zero.issuperset(inputs):
            raise UnsafeError("its operator ConstantOfShape makes a tensor that is not empty")

    def _dims(self, tensor: _Fields) -> list[int]:
        """A tensor's shape. A negative size reads as one near 2 ** 64."""
        dims = list(islice(self._packed(tensor.get(_TENSOR_DIMS, [])), _MAX_RANK + 1))
        if len(dims) > _MAX_RANK:
            raise UnsafeError(f"it has a tensor of more than {_MAX_RANK} dimensions")
        return dims

    def _tensor(self, tensor: _Fields) -> None:
        """Weights must lie in the file, every byte that their shape needs."""
        name = self.text(tensor, _TENSOR_NAME)
        shown = repr(name[:80])
        self._no_external_data(tensor, shown)
        kind = self.one(tensor, _TENSOR_TYPE)
        if not isinstance(kind, int) or kind not in _ITEM_BYTES:
            raise UnsafeError(f"its weights {shown} are of type {kind}")
        dims = self._dims(tensor)
        raw = self.one(tensor, _TENSOR_RAW)
        start, end = (0, 0) if raw is None else _span(raw)
        if math.prod(dims) * _ITEM_BYTES[kind] != end - start:
            shape = " x ".join(map(str, dims)) or "()"
            raise UnsafeError(f"its weights {shown} of shape {shape} have {end - start} bytes in the file")
        if kind == _INT64:
            numbers = np.frombuffer(self._data[start:end], "<i8").tolist()
            # They are sizes, and places in what the file holds, or "to the end".
            if any(abs(number) > self.size for number in numbers if number != _TO_THE_END):
                raise UnsafeError(f"its weights {shown} are {numbers[:3]}, more than a file of {self.size} bytes holds")
            if numbers == [0]:
                self._zeros.add(name)

    def _no_external_data(self, tensor: _Fields, owner: str) -> None:
        if _TENSOR_EXTERNAL in tensor or self.one(tensor, _TENSOR_LOCATION):
            raise UnsafeError(f"its weights {owner} lie in another file")


def _span(value: int | _Span | None) -> _Span:
    """A field that must be a message or text."""
    if not isinstance(value, tuple):
        raise DamagedError("a number where a message should be")
    return value
