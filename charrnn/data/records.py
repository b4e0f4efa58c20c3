"""Records with a field of text: JSON lines, Parquet, and datasets of Hugging Face's `datasets` library (hf:).

JSON lines are not read with `datasets`, which copies them into its cache, needs the extra `data`, and does not name the
line of a record that it cannot read.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from charrnn.data.streams import Stream, damaged_error
from charrnn.errors import CorpusError, listing

DEFAULT_FIELD = "text"
MAX_LINE_BYTES = 256 << 20
_ROWS = 1000


# ---- JSON lines


def read_json_lines(stream: Stream, field: str) -> Iterator[str]:
    """Yield the texts in `field` of a file with a JSON object on each line; skip blank lines and empty texts.

    Raises:
        CorpusError: A line is not such an object, or has no text there; with the line.
    """
    with stream.open() as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{stream.name}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise CorpusError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; split the record")
            if line.strip() and (text := _text_of(line, field, where)):
                yield text


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not JSON: {error}; each line must be one object; fix or remove it") from error
    if not isinstance(record, dict):
        expected = f"each line must be an object such as {{{json.dumps(field)}: ...}}"
        raise CorpusError(f"{where}: {json.dumps(record):.40}, and {expected}")
    if field not in record:
        raise CorpusError(f"{where}: {_no_field(field, list(record))}")
    text = record[field]
    if not isinstance(text, str):
        texts = [key for key, value in record.items() if isinstance(value, str)]
        raise CorpusError(f"{where}: {_not_text(field, f'{json.dumps(text):.40}', texts)}")
    if b"\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
        raise CorpusError(f"{where}: a lone surrogate in {field!r}, which is not a character; fix or remove it")
    return text


def _no_field(field: str, fields: list[str]) -> str:
    return f"no field {field!r} (--text-field); it has {listing(fields) or 'none'}"


def _not_text(field: str, value: str, texts: list[str]) -> str:
    remedy = f"fields with text: {listing(texts)} (--text-field)" if texts else "remove such records"
    return f"the field {field!r} holds {value}, not a text; {remedy}"


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


def read_rows(batches: Iterable[Any], field: str, name: str, kind: str, errors: Any) -> Iterator[str]:
    """Yield the non-empty texts of a table.

    Args:
        batches: Record batches or tables of pyarrow, whose only column is `field`.
        field: Column.
        name: Table, for messages.
        kind: What the table is, for messages.
        errors: The exceptions that reading a batch may raise.

    Raises:
        CorpusError: A batch is damaged, or a row has no text.
    """
    row = 0
    try:
        for batch in batches:
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                if text is None:
                    raise CorpusError(f"{name}, row {row}: {_not_text(field, 'null', [])}")
                if text:
                    yield text
    except CorpusError:
        raise
    except errors as error:
        raise damaged_error(Path(name), kind, f"at or after row {row}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return a library's error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


# ---- Parquet


def check_parquet(path: Path, field: str) -> None:
    """Check that the file is Parquet and has a text column `field`. Raises: CorpusError."""
    _open_parquet(path, field).close()


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Yield the texts in the column `field`, one row group after the other. Raises: CorpusError."""
    import pyarrow as pa

    with _open_parquet(path, field) as file:
        errors = (pa.ArrowException, OSError, ValueError)
        yield from read_rows(file.iter_batches(_ROWS, columns=[field]), field, str(path), "Parquet", errors)


def _open_parquet(path: Path, field: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        what = "reading Parquet files (.parquet) needs the package pyarrow"
        raise CorpusError(f"{what}: pip install 'charrnn[data]'") from None
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_error(path, "Parquet", reason_of(error)) from error
    check_column(file.schema_arrow, field, str(path))
    return file
