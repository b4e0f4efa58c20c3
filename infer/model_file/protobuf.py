"""Reading ONNX files without a package for protobuf or ONNX, and without copying weights.

Sources: https://protobuf.dev/programming-guides/encoding/ and onnx.proto (IR version 8).
"""

from typing import Any

MAX_RANK = 3
MAX_DEPTH = 3  # of graphs within graphs
# The largest model file of 100 layers has some 60,000 fields; the bound is one on time and memory.
_MAX_FIELDS = 200_000

# Where bytes begin and end.
Span = tuple[int, int]
# A message's fields by name: the value, the list of a repeated field, or protobuf's default.
Message = dict[str, Any]

# Kind of message -> the fields that charrnn writes: number -> name and type. A type is a kind of message or one of
# Python's, bytes being a Span; in a list it is repeated.
_SCHEMA: dict[str, dict[int, tuple[str, Any]]] = {
    "model": {1: ("ir_version", int), 2: ("producer_name", str), 3: ("producer_version", str), 7: ("graph", bytes),
              8: ("opset_import", ["set of operators"]), 14: ("metadata_props", ["metadata entry"])},
    "set of operators": {1: ("domain", str), 2: ("version", int)},
    "metadata entry": {1: ("key", str), 2: ("value", str)},
    "graph": {1: ("node", ["node"]), 2: ("name", str), 5: ("initializer", ["tensor"]),
              11: ("input", ["value"]), 12: ("output", ["value"])},
    "node": {1: ("input", [str]), 2: ("output", [str]), 4: ("op_type", str), 5: ("attribute", ["attribute"]),
             7: ("domain", str)},
    "attribute": {1: ("name", str), 2: ("f", float), 3: ("i", int), 5: ("t", "zero"), 6: ("g", "graph"),
                  8: ("ints", [int]), 20: ("type", int)},
    "tensor": {1: ("dims", [int]), 2: ("data_type", int), 8: ("name", str), 9: ("raw_data", bytes),
               13: ("external_data", [bytes]), 14: ("data_location", int)},
    "zero": {1: ("dims", [int]), 2: ("data_type", int), 7: ("int64_data", [int]), 8: ("name", str)},
    "value": {1: ("name", str), 2: ("type", "type")},
    "type": {1: ("tensor_type", "tensor type"), 9: ("optional_type", "optional type")},
    "optional type": {1: ("elem_type", "required type")},
    "required type": {1: ("tensor_type", "tensor type")},
    "tensor type": {1: ("elem_type", int), 2: ("shape", "shape")},
    "shape": {1: ("dim", ["dimension"])},
    "dimension": {1: ("dim_value", int), 2: ("dim_param", str)},
}  # fmt: skip
# What `parse` finds of a value on the wire: a number, four bytes, or for all other types where its bytes are.
_RAW = {int: int, float: bytes}


class DamagedError(ValueError):
    """The bytes are no message of the expected kind."""


class UnsafeError(ValueError):
    """A message holds what no model file of charrnn holds."""


class Parser:
    """Parses messages out of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._num_fields = 0

    def parse(self, message: Span, kind: str, depth: int = 0) -> Message:
        """Return a message's fields, those of the messages in it included.

        Args:
            message: Where it is.
            kind: A key of `_SCHEMA`.
            depth: Graphs around it.

        Raises:
            DamagedError, UnsafeError: for bytes that are no such message, or that charrnn does not write.
        """
        at, end = message
        schema, found = _SCHEMA[kind], Message()
        if depth > MAX_DEPTH:
            raise UnsafeError(f"it has graphs more than {MAX_DEPTH} graphs deep")
        while at < end:
            start = at
            tag, at = self._varint(at, end)
            size = 0
            raw: Any
            match tag & 7:
                case 0:
                    raw, at = self._varint(at, end)
                case 2:
                    size, at = self._varint(at, end)
                    raw = (at, at + size)
                case 5:
                    size, raw = 4, self.data[at : at + 4]
                case _:
                    raise DamagedError(f"a field of unknown kind at byte {start}")
            at += size
            if at > end or not tag >> 3:
                raise DamagedError(f"the field at byte {start} does not end where it should")
            if tag >> 3 not in schema:
                raise UnsafeError(f"it has field {tag >> 3} in a {kind}")
            self._num_fields += 1
            if self._num_fields > _MAX_FIELDS:
                raise UnsafeError(f"it has more than {_MAX_FIELDS} parts")
            name, of = schema[tag >> 3]
            if isinstance(of, list):
                self._append(found.setdefault(name, []), of[0], raw, depth)
            elif name in found:  # protobuf would merge the two
                raise DamagedError(f"field {tag >> 3} is there 2 times")
            else:
                found[name] = self._value(of, raw, depth)
        for name, of in schema.values():
            found.setdefault(name, [] if isinstance(of, list) else of() if of in (int, str) else None)
        return found

    def _append(self, values: list[Any], of: Any, raw: Any, depth: int) -> None:
        """Append a value of a repeated field, or those that are packed into one."""
        if of is int and isinstance(raw, tuple):
            at, end = raw
            while at < end:
                number, at = self._varint(at, end)
                self._append(values, int, number, depth)
            return
        values.append(self._value(of, raw, depth))
        if of in (int, "dimension") and len(values) > MAX_RANK:
            raise UnsafeError(f"it has a tensor of more than {MAX_RANK} dimensions")

    def _value(self, of: Any, raw: Any, depth: int) -> Any:
        expected: Any = _RAW.get(of, tuple)
        if not isinstance(raw, expected):
            raise DamagedError(f"a value is not of the type {of}")
        if of in (int, float, bytes):
            return raw
        if of is not str:
            return self.parse(raw, of, depth + (of == "graph"))
        try:
            return self.data[slice(*raw)].decode()
        except UnicodeDecodeError:
            raise DamagedError(f"text that is not UTF-8 at byte {raw[0]}") from None

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the number that begins at `at`, and where the next byte is."""
        if at < end and self.data[at] < 128:  # most are
            return self.data[at], at + 1
        value = 0
        for i in range(at, min(at + 10, end)):
            byte = self.data[i]
            value |= (byte & 127) << 7 * (i - at)
            if byte < 128:
                return value, i + 1
        raise DamagedError(f"the number at byte {at} does not end")
