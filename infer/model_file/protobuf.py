"""Reading protobuf's wire format without a package for it, and without copying what is not asked for.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Iterator, Set

# The largest model file of 100 layers has some 60,000 fields; the bound is one on the time that reading takes.
_MAX_FIELDS = 1_000_000
_MAX_NUMBER = 2**29  # protobuf's own
_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}

# A message, or a field's value: where its bytes begin and end.
Span = tuple[int, int]
# Field number -> the field's values in their order: a number, or where the value's bytes are.
Fields = dict[int, list[int | Span]]


class DamagedError(ValueError):
    """The bytes are no message of the expected kind."""


class UnsafeError(ValueError):
    """A message holds what no model file of charrnn holds."""


class Reader:
    """Read messages out of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._num_fields = 0

    def fields(self, message: Span, known: Set[int], what: str) -> Fields:
        """A message's fields. Raises: UnsafeError for one that is not among the `known` numbers of a `what`."""
        at, end = message
        data = self.data
        found: Fields = {}
        while at < end:
            start = at
            tag, at = (data[at], at + 1) if data[at] < 128 else self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            value: int | Span
            if kind == _VARINT:
                value, at = self._varint(at, end)
            elif kind == _BYTES:
                size, at = self._varint(at, end)
                value = (at, at + size)
                at += size
            elif kind in _FIXED_BYTES:
                value = int.from_bytes(data[at : at + _FIXED_BYTES[kind]], "little")
                at += _FIXED_BYTES[kind]
            else:
                raise DamagedError(f"a field of unknown kind at byte {start}")
            if not 0 < number < _MAX_NUMBER or at > end:
                raise DamagedError(f"the field at byte {start} does not end where it should")
            if number not in known:
                raise UnsafeError(f"it has field {number} in a {what}")
            found.setdefault(number, []).append(value)
            self._num_fields += 1
            if self._num_fields > _MAX_FIELDS:
                raise UnsafeError(f"it has more than {_MAX_FIELDS} parts")
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number that begins at `at`, and where the next byte is."""
        value = 0
        for i in range(at, min(at + 10, end)):
            byte = self.data[i]
            value |= (byte & 127) << 7 * (i - at)
            if byte < 128:
                return value, i + 1
        raise DamagedError(f"the number at byte {at} does not end")

    def one(self, fields: Fields, number: int) -> int | Span | None:
        """The only value of a field; None without one. Twice the same protobuf would merge."""
        values = fields.get(number, [None])
        if len(values) > 1:
            raise DamagedError(f"field {number} is there {len(values)} times")
        return values[0]

    def number(self, fields: Fields, number: int) -> int:
        """A numeric field; without one 0, protobuf's default. Raises: DamagedError when it is a message."""
        value = self.one(fields, number)
        if isinstance(value, tuple):
            raise DamagedError("a message where a number should be")
        return value or 0

    def text(self, fields: Fields, number: int) -> str:
        """A string field; without one "", protobuf's default."""
        value = self.one(fields, number)
        return "" if value is None else self._decoded(span(value))

    def texts(self, fields: Fields, number: int) -> list[str]:
        """A repeated string field."""
        return [self._decoded(span(value)) for value in fields.get(number, [])]

    def _decoded(self, message: Span) -> str:
        start, end = message
        try:
            return self.data[start:end].decode()
        except UnicodeDecodeError:
            raise DamagedError(f"text that is not UTF-8 at byte {start}") from None

    def packed(self, values: list[int | Span]) -> Iterator[int]:
        """A repeated number, one value a field or many."""
        for value in values:
            if isinstance(value, int):
                yield value
                continue
            at, end = value
            while at < end:
                number, at = self._varint(at, end)
                yield number


def span(value: int | Span | None) -> Span:
    """A field that must be a message or text."""
    if not isinstance(value, tuple):
        raise DamagedError("a number where a message should be")
    return value
