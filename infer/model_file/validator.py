"""Inspection of an ONNX file before onnxruntime opens it: what charrnn's export does not write is refused unrun.

onnxruntime reads other files that a model points to, allocates what a model declares, and believes its numbers; some
graphs end its process. So a file must consist of the parts that train.export writes and of nothing else: these
protobuf fields, these weights in these shapes, these constants with these values, and a graph whose structure has one
of the digests in graph_digests.txt (written by `python tests/graph_digests.py`). It needs no package for ONNX; weights
stay unread.
Letters: V, E, H, L as in docs/model-file.md.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from infer.model_file.graph_structure import layerless, structure_digest
from infer.model_file.layout import Sizes, constants
from infer.model_file.protobuf import DamagedError, Message, Parser, Span, UnsafeError

DIGESTS = frozenset(Path(__file__).with_name("graph_digests.txt").read_text("ascii").split())
# protobuf's own limit for a message, and so onnxruntime's for a file.
MAX_FILE_BYTES = 2**31 - 1
# A vocabulary of every Unicode character takes 11 MiB.
MAX_METADATA_BYTES = 16 * 2**20
MAX_METADATA_KEYS = 1000
_IR_VERSION = 8
_OPSETS = {"": 17, "com.microsoft": 1}
# TensorProto.DataType -> name and bytes an element.
_TYPES = {1: ("f32", 4), 2: ("u8", 1), 3: ("i8", 1), 7: ("i64", 8), 9: ("bool", 1), 10: ("f16", 2), 11: ("f64", 8)}
_DTYPES = {"f4": "f32", "u1": "u8", "i1": "i8", "i8": "i64", "b1": "bool", "f2": "f16", "f8": "f64"}

Shape = tuple[int, ...]
_Tensor = tuple[str, Shape, Span]  # element type, shape and where the data lies


@dataclass(frozen=True)
class Outline:
    """What a file's headers hold.

    Attributes:
        parser: Of its bytes.
        metadata: Key -> value.
        graph: Where the graph lies.
    """

    parser: Parser
    metadata: dict[str, str]
    graph: Span


def outline(data: bytes) -> Outline:
    """Read the metadata of an ONNX file, not empty.

    Raises:
        DamagedError, UnsafeError: for bytes that are no ONNX file, or one that charrnn does not write.
    """
    parser = Parser(data)
    model = parser.parse((0, len(data)), "model")
    if model["graph"] is None:
        raise DamagedError("it has no graph")
    entries = model["metadata_props"]
    size = sum(len(entry["key"]) + len(entry["value"]) for entry in entries)
    if len(entries) > MAX_METADATA_KEYS or size > MAX_METADATA_BYTES:
        raise UnsafeError(f"its metadata takes more than {MAX_METADATA_BYTES // 2**20} MiB or {MAX_METADATA_KEYS} keys")
    metadata: dict[str, str] = {}
    for entry in entries:
        if entry["key"] in metadata:
            raise UnsafeError(f"its metadata has {entry['key'][:40]!r} twice")
        metadata[entry["key"]] = entry["value"]
    if "charrnn.format_version" in metadata:  # another program's file is reported as such, whatever it needs
        _check_versions(model)
    return Outline(parser, metadata, model["graph"])


def _check_versions(model: Message) -> None:
    if model["ir_version"] != _IR_VERSION:
        raise UnsafeError(f"it is written in ONNX's IR version {model['ir_version']}")
    for opset in model["opset_import"]:
        if _OPSETS.get(opset["domain"]) != opset["version"]:
            raise UnsafeError(f"it needs version {opset['version']} of the operators {opset['domain'][:80]!r}")


def check_graph(found: Outline, sizes: Sizes) -> None:
    """Refuse a graph that has any part that charrnn does not write.

    Raises:
        DamagedError, UnsafeError: with the part.
    """
    if graph_digest(found, sizes) not in DIGESTS:
        raise UnsafeError("its graph is joined otherwise than those that charrnn writes")


def graph_digest(found: Outline, sizes: Sizes) -> str:
    """Return the digest of a graph's structure, after checking its weights."""
    graph = found.parser.parse(found.graph, "graph")
    return structure_digest(graph, _check_weights(found.parser.data, graph["initializer"], sizes), sizes)


# ---- weights


def _check_weights(data: bytes, initializers: list[Message], sizes: Sizes) -> dict[str, str]:
    """Check every weight's name, type and shape, and every constant's value.

    Returns:
        name -> what the structure calls it: a constant by its name, others with their element type.
    """
    expected = constants(sizes)
    tensors: dict[str, _Tensor] = {}
    for tensor in initializers:
        if tensor["name"] in tensors:
            raise UnsafeError(f"it has the weights {tensor['name'][:80]!r} twice")
        tensors[tensor["name"]] = _check_tensor(tensor)
    embedding = tensors.get("embedding", ("", (0, 0)))[1]
    embedding_dim = embedding[1] if len(embedding) == 2 else 0
    for name, (kind, dims, (start, end)) in tensors.items():
        if (array := expected.get(name)) is not None:
            same_type = (kind, dims) == (_DTYPES[array.dtype.str[1:]], array.shape)
            if not same_type or data[start:end] != array.tobytes():
                raise UnsafeError(f"its constant {name[:80]!r} is not that of {sizes}")
        elif (shape := _weight_shape(name, sizes, embedding_dim)) is None:
            raise UnsafeError(f"it has weights called {name[:80]!r}")
        elif shape != dims or kind not in ("f32", "f16", "i8", "u8"):
            raise UnsafeError(f"its weights {name!r} are {kind} of shape {_shown(dims)}, which is not that of {sizes}")
    return {name: name if name in expected else f"{layerless(name)} {tensors[name][0]}" for name in tensors}


def _check_tensor(tensor: Message) -> _Tensor:
    """Return a tensor's element type, shape and where its data lies, all of which must be in the file."""
    shown = repr(tensor["name"][:80])
    if tensor["external_data"] or tensor["data_location"]:
        raise UnsafeError(f"its weights {shown} lie in another file")
    if tensor["data_type"] not in _TYPES:
        raise UnsafeError(f"its weights {shown} are of type {tensor['data_type']}")
    dims = tuple(tensor["dims"])
    start, end = tensor["raw_data"] or (0, 0)
    kind, size = _TYPES[tensor["data_type"]]
    if math.prod(dims) * size != end - start:
        raise UnsafeError(f"its weights {shown} of shape {_shown(dims)} have {end - start} bytes in the file")
    return kind, dims, (start, end)


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
