"""Texts that are a field of records: JSON lines and Parquet files, a record at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charrnn.data.parts import Chunks, size_of
from charrnn.errors import CorpusError, listing
from charrnn.io import Advance

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_FIELD = "text"
LONGEST_LINE = 256 << 20
_ROWS = 1000
_JSON_TYPES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def read_json_lines(source: Chunks, field: str, name: str, advance: Advance) -> Iterator[str]:
    """The texts in `field` of a file that has a JSON object on each line; blank lines and empty texts are passed over.

    name: the file's. Raises: CorpusError, with the line, for what is not such an object or has no text there.
    """
    for number, line in enumerate(_lines(source, name, advance), 1):
        if line.strip():
            text = _text_of(line, field, f"{name}, line {number}")
            if text:
                yield text


def _lines(source: Chunks, name: str, advance: Advance) -> Iterator[bytes]:
    pending: list[bytes] = []
    number, length = 1, 0
    for chunk in source(advance):
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*pending, line])
            pending, length, number = [], 0, number + 1
        pending.append(rest)
        length += len(rest)
        if length > LONGEST_LINE:
            raise CorpusError(f"{name}, line {number}: longer than {LONGEST_LINE >> 20} MiB; cut the record up")
    yield b"".join(pending)


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise CorpusError(f"{where}: not JSON: {error}; each line must be one object; mend or remove it") from error
    if not isinstance(record, dict):
        kind = _json_type(record)
        raise CorpusError(f"{where}: {kind}, and each line must be an object such as {{{json.dumps(field)}: ...}}")
    if field not in record:
        raise CorpusError(f"{where}: {_no_field(field, list(record))}")
    text = record[field]
    if not isinstance(text, str):
        texts = [key for key, value in record.items() if isinstance(value, str)]
        raise CorpusError(f"{where}: {_no_text(field, _json_type(text), texts)}")
    if b"\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
        raise CorpusError(f"{where}: half of a surrogate pair in {field!r}, which is no character; mend or remove it")
    return text


def _json_type(value: Any) -> str:
    return "null" if value is None else _JSON_TYPES.get(type(value), "a string")


def _no_field(field: str, fields: list[str]) -> str:
    return f"no field {field!r} (--text-field); it has {listing(fields) or 'none'}"


def _no_text(field: str, kind: str, texts: list[str]) -> str:
    others = [name for name in texts if name != field]
    return f"the field {field!r} holds {kind}, not a text; " + (
        f"fields with text: {listing(others)} (--text-field)" if others else "leave such records out"
    )


def import_arrow(what: str) -> Any:
    """The pyarrow module. what: needs it. Raises: CorpusError when it is not installed."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise CorpusError(f"reading {what} needs the package pyarrow: pip install 'charrnn[data]'") from None
    return pyarrow


def check_column(schema: "pa.Schema", field: str, name: str) -> None:
    """Raises: CorpusError when a table has no column `field`, or no text in it. name: the table's."""
    if field not in schema.names:
        raise CorpusError(f"{name}: {_no_field(field, schema.names)}")
    if schema.names.count(field) > 1:
        raise CorpusError(f"{name}: several columns are called {field!r}; rename all but one")
    kind = schema.types[schema.names.index(field)]
    if not _holds_text(kind):
        texts = [column for column, other in zip(schema.names, schema.types, strict=True) if _holds_text(other)]
        raise CorpusError(f"{name}: {_no_text(field, str(kind), texts)}")


def _holds_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def column_texts(column: Any, first_row: int, field: str, name: str) -> Iterator[str]:
    """The texts of a piece of a column (a pyarrow array); empty ones are passed over. first_row: its first, from 1.

    Raises: CorpusError, with the row, for one that is missing or not UTF-8.
    """
    for row, value in enumerate(column, first_row):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{name}, row {row}: the field {field!r} is not UTF-8; write the file anew") from error
        if text is None:
            raise CorpusError(f"{name}, row {row}: {_no_text(field, 'null', [])}")
        if text:
            yield text


def check_parquet(path: Path, field: str) -> None:
    """Raises: CorpusError when the file is damaged, or has no column of texts called `field`."""
    with _parquet(path, field):
        pass


def read_parquet(path: Path, field: str, advance: Advance) -> Iterator[str]:
    """The texts in the column `field`, one row group after the other. advance: called with the file's bytes, by rows.

    Raises: CorpusError when the file is damaged, or a row has no text there.
    """
    import pyarrow as pa

    size, told, row = size_of(path), 0, 1
    with _parquet(path, field) as file:
        rows = max(1, file.metadata.num_rows)
        batches = file.iter_batches(_ROWS, columns=[field])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _damaged_parquet(path, error) from error
            if batch is None:
                break
            yield from column_texts(batch.column(0), row, field, str(path))
            row += batch.num_rows
            now = size * (row - 1) // rows
            advance(now - told)
            told = now
    advance(size - told)


def _parquet(path: Path, field: str) -> Any:
    """The opened file, which has texts in the column `field`."""
    pa = import_arrow("Parquet files (.parquet)")
    import pyarrow.parquet as pq

    size_of(path)  # what is not there is told apart from what is damaged
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged_parquet(path, error) from error
    check_column(schema, field, str(path))
    return file


def _damaged_parquet(path: Path, error: Exception) -> CorpusError:
    reason = " ".join(str(error).split())[:200]
    return CorpusError(f"{path} is a damaged Parquet file: {reason}; bring it again, or leave it out")
