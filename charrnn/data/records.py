"""Records with a field of text: JSON lines, Parquet, and datasets of Hugging Face's `datasets` library (hf:).

JSON lines are not read with `datasets`, which copies them into its cache, needs the extra `data`, and does not name the
line of a record that it cannot read.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from charrnn.data.parts import size_of
from charrnn.data.streams import Stream, damaged_error
from charrnn.errors import CorpusError, listing
from charrnn.io import Advance

DEFAULT_FIELD = "text"
MAX_LINE_BYTES = 256 << 20
_ROWS = 1000
_JSON_TYPES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


# ---- JSON lines


def read_json_lines(stream: Stream, field: str, advance: Advance) -> Iterator[str]:
    """Yield the texts in `field` of a file with a JSON object on each line; skip blank lines and empty texts.

    Raises:
        CorpusError: A line is not such an object, or has no text there; with the line.
    """
    for number, line in enumerate(_lines(stream, advance), 1):
        if line.strip() and (text := _text_of(line, field, f"{stream.name}, line {number}")):
            yield text


def _lines(stream: Stream, advance: Advance) -> Iterator[bytes]:
    pending: list[bytes] = []
    number, length = 1, 0
    for chunk in stream.chunks(advance):
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*pending, line])
            pending, length, number = [], 0, number + 1
        pending.append(rest)
        length += len(rest)
        if length > MAX_LINE_BYTES:
            limit = f"longer than {MAX_LINE_BYTES >> 20} MiB"
            raise CorpusError(f"{stream.name}, line {number}: {limit}; split the record")
    yield b"".join(pending)


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise CorpusError(f"{where}: not JSON: {error}; each line must be one object; fix or remove it") from error
    if not isinstance(record, dict):
        expected = f"each line must be an object such as {{{json.dumps(field)}: ...}}"
        raise CorpusError(f"{where}: {_json_type(record)}, and {expected}")
    if field not in record:
        raise CorpusError(f"{where}: {_no_field(field, list(record))}")
    text = record[field]
    if not isinstance(text, str):
        texts = [key for key, value in record.items() if isinstance(value, str)]
        raise CorpusError(f"{where}: {_not_text(field, _json_type(text), texts)}")
    if b"\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
        raise CorpusError(f"{where}: a lone surrogate in {field!r}, which is not a character; fix or remove it")
    return text


def _json_type(value: Any) -> str:
    return "null" if value is None else _JSON_TYPES.get(type(value), "a string")


def _no_field(field: str, fields: list[str]) -> str:
    return f"no field {field!r} (--text-field); it has {listing(fields) or 'none'}"


def _not_text(field: str, kind: str, texts: list[str]) -> str:
    others = [name for name in texts if name != field]
    remedy = f"fields with text: {listing(others)} (--text-field)" if others else "remove such records"
    return f"the field {field!r} holds {kind}, not a text; {remedy}"


# ---- Arrow tables


def check_column(schema: Any, field: str, name: str) -> None:
    """Check that the table `name`, with a pyarrow schema, has a text column `field`. Raises: CorpusError."""
    if field not in schema.names:
        raise CorpusError(f"{name}: {_no_field(field, schema.names)}")
    if schema.names.count(field) > 1:
        raise CorpusError(f"{name}: several columns are named {field!r}; rename all but one")
    kind = schema.types[schema.names.index(field)]
    if not _holds_text(kind):
        texts = [column for column, other in zip(schema.names, schema.types, strict=True) if _holds_text(other)]
        raise CorpusError(f"{name}: {_not_text(field, str(kind), texts)}")


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def read_rows(
    batches: Iterator[Any], rows: int, size: int, field: str, name: str, advance: Advance, kind: str, errors: Any
) -> Iterator[str]:
    """Yield the non-empty texts of a table.

    Args:
        batches: Record batches or tables of pyarrow, whose only column is `field`.
        rows: Their number of rows in all.
        size: Bytes on disk.
        field: Column.
        name: Table, for messages.
        advance: Called with the bytes, in proportion to the rows.
        kind: What the table is, for messages.
        errors: The exceptions that reading a batch may raise.

    Raises:
        CorpusError: A batch is damaged, or a row has no text.
    """
    done, row = 0, 1
    while True:
        try:
            batch = next(batches, None)
        except errors as error:
            raise damaged_error(Path(name), kind, f"row {row} or later: {reason_of(error)}") from error
        if batch is None:
            break
        for number, value in enumerate(batch.column(0), row):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise CorpusError(f"{name}, row {number}: the field {field!r} is not UTF-8; write it again") from error
            if text is None:
                raise CorpusError(f"{name}, row {number}: {_not_text(field, 'null', [])}")
            if text:
                yield text
        row += batch.num_rows
        now = size * (row - 1) // max(1, rows)
        advance(now - done)
        done = now
    advance(size - done)


def reason_of(error: Exception) -> str:
    """Return a library's error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


# ---- Parquet


def check_parquet(path: Path, field: str) -> None:
    """Check that the file is Parquet and has a text column `field`. Raises: CorpusError."""
    _open_parquet(path, field).close()


def read_parquet(path: Path, field: str, advance: Advance) -> Iterator[str]:
    """Yield the texts in the column `field`, one row group after the other. Raises: CorpusError."""
    import pyarrow as pa

    with _open_parquet(path, field) as file:
        batches = file.iter_batches(_ROWS, columns=[field])
        errors = (pa.ArrowException, OSError, ValueError)
        yield from read_rows(
            batches, file.metadata.num_rows, size_of(path), field, str(path), advance, "Parquet", errors
        )


def _open_parquet(path: Path, field: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        what = "reading Parquet files (.parquet) needs the package pyarrow"
        raise CorpusError(f"{what}: pip install 'charrnn[data]'") from None
    size_of(path)  # a missing file is not a damaged one
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_error(path, "Parquet", reason_of(error)) from error
    check_column(schema, field, str(path))
    return file
