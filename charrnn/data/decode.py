"""Bytes to normalized text, incrementally: encodings, invalid bytes, line ends, Unicode normal forms, documents."""

import codecs
import io
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from charrnn.data.parts import Part
from charrnn.errors import CorpusError

_BYTE_ORDER_MARK = "\ufeff"
_REPLACEMENT = "\ufffd"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LONGEST_MARK = 4
_REPLACE_AND_RECORD = "charrnn.replace"
_SURROGATES = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """A piece of a corpus that is not empty.

    Attributes:
        text: str, or bytes of a binary corpus.
        utf8: Its UTF-8, where the file has just these bytes; None where it is to be encoded.
    """

    text: str | bytes
    utf8: bytes | None = None


_replaced = threading.local()  # .starts: where the invalid sequences of one decode call began


@dataclass(frozen=True)
class Rules:
    """How a corpus's bytes become symbols: the fields of DataConfig with these names.

    Attributes:
        binary: The bytes are the symbols, and of the other rules only document_end applies.
    """

    binary: bool = False
    document_end: str = ""
    encoding: str = "auto"
    invalid: Literal["refuse", "replace"] = "refuse"
    newlines: Literal["universal", "keep"] = "universal"
    normalize: Literal["none", "NFC", "NFD", "NFKC", "NFKD"] = "none"


@dataclass
class Replaced:
    """The invalid sequences that were replaced: their number, and the place of the first."""

    count: int = 0
    first: str = ""


def read_texts(parts: Iterable[Part], rules: Rules, replaced: Replaced) -> Iterator[Piece]:
    """Yield the text of a corpus in pieces.

    Documents (files, members of archives, records) are followed by `rules.document_end`. Without one, each begins on a
    new line, except in a binary corpus.

    Args:
        parts: Parts of the corpus.
        rules: How their bytes become symbols.
        replaced: Counts the invalid sequences.

    Raises:
        CorpusError: A file cannot be read or decoded, or a document contains its end character.
    """
    end: Any = rules.document_end.encode() if rules.binary else rules.document_end
    ends_line = True
    for part in parts:
        for document in _documents(part, rules, replaced):
            piece: Piece | None = None
            for piece in _begun_on_a_line(document, ends_line or bool(end) or rules.binary):
                if end and end in piece.text:
                    remedy = "set data.document_end to a character that no text has"
                    raise CorpusError(f"{part.name} has the document end {end!r} inside of a text; {remedy}")
                yield piece
            if piece:
                ends_line = piece.text[-1:] in ("\n", b"\n")
                if end:
                    yield Piece(end)


def _begun_on_a_line(document: Iterator[Piece], begins_line: bool) -> Iterator[Piece]:
    """Put a newline before a document that is not empty, unless it begins a line already."""
    if (first := next(document, None)) is not None:
        yield from chain(() if begins_line else (Piece("\n"),), (first,), document)


def _documents(part: Part, rules: Rules, replaced: Replaced) -> Iterator[Iterator[Piece]]:
    """Yield each document as its pieces."""
    if part.documents is None or (rules.binary and not rules.document_end):
        chunks = part.chunks()
        yield map(Piece, chunks) if rules.binary else _normalized(_decoded(chunks, part, rules, replaced), rules)
    else:
        for text in part.documents():
            yield iter([Piece(text.encode())]) if rules.binary else _normalized([(text, None)], rules)


def detect_encoding(head: bytes) -> str:
    """Return the codec of a file by its first 4 bytes: that of its byte order mark, else UTF-8."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), "utf-8")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _replaced.starts.append(error.start)
    return _REPLACEMENT, error.end


codecs.register_error(_REPLACE_AND_RECORD, _replace)


def _decoded(
    chunks: Iterator[bytes], part: Part, rules: Rules, replaced: Replaced
) -> Iterator[tuple[str, bytes | None]]:
    """Decode a file; errors name the offset of an invalid byte in it. Yields: texts, and their bytes if UTF-8."""
    head = b""
    while len(head) < _LONGEST_MARK and (chunk := next(chunks, b"")):
        head += chunk
    codec = codecs.lookup(detect_encoding(head) if rules.encoding == "auto" else rules.encoding)
    is_utf8 = codec.name in ("utf-8", "utf-8-sig")
    new_decoder: Any = codecs.getincrementaldecoder("utf-8" if is_utf8 else codec.name)
    decoder = new_decoder("strict" if rules.invalid == "refuse" else _REPLACE_AND_RECORD)
    offset, pending = 0, b""  # place of the first byte that is not decoded yet, and those that were read from there on
    for chunk in chain((head,), chunks, (b"",)):
        _replaced.starts = []
        try:
            text = decoder.decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            raise _invalid_error(part.name, codec.name, error.object[error.start], offset + error.start) from error
        except UnicodeError as error:
            remedy = "name its byte order, as in utf-16-le" if "BOM" in str(error) else "name another encoding"
            raise CorpusError(f"{part.name} is not {codec.name.upper()} text: {error}; {remedy}") from error
        if _replaced.starts:
            replaced.first = replaced.first or f"byte {offset + _replaced.starts[0]} of {part.name}"
            replaced.count += len(_replaced.starts)
        read, pending = pending + chunk, decoder.getstate()[0]
        offset += len(read) - len(pending)
        if is_utf8:
            yield text, None if _replaced.starts else read[: len(read) - len(pending)]
        else:
            yield _without_surrogates(text, rules, part.name), None


def _invalid_error(name: str, codec: str, byte: int, offset: int) -> CorpusError:
    return CorpusError(
        f"{name} is not {codec.upper()} text: byte 0x{byte:02x} at offset {offset}; name its encoding with "
        "--encoding, replace such bytes by U+FFFD with --set data.invalid=replace, exclude the file, or read bytes "
        "with --set data.vocab=bytes"
    )


def _without_surrogates(text: str, rules: Rules, name: str) -> str:
    """Replace or refuse surrogates, which some codecs (utf-7, raw_unicode_escape) let through."""
    if rules.invalid == "replace":
        return _SURROGATES.sub(_REPLACEMENT, text)
    if found := _SURROGATES.search(text):
        what = f"a lone surrogate, U+{ord(found[0]):04X}, which is not a character"
        raise CorpusError(f"{name} has {what}; replace it with --set data.invalid=replace")
    return text


def _normalized(texts: Iterable[tuple[str, bytes | None]], rules: Rules) -> Iterator[Piece]:
    """Remove a document's byte order mark, convert its line ends, and apply the normal form."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    begun, held = False, ""
    for text, utf8 in chain((item for item in texts if item[0]), (("", None),)):
        final = not text
        if not begun and text.startswith(_BYTE_ORDER_MARK):
            text, utf8 = text[1:], None
        begun = True
        # The decoder's state is that a carriage return ended the last text. Few texts have one, and to look is faster.
        if rules.newlines == "universal" and ("\r" in text or newlines.getstate()[1]):
            text, utf8 = newlines.decode(text, final), None
        if rules.normalize != "none":
            text = held + text
            cut = len(text) if final else _last_cut(text)
            text, held, utf8 = unicodedata.normalize(rules.normalize, text[:cut]), text[cut:], None
        if text:
            yield Piece(text, utf8)


def _last_cut(text: str) -> int:
    """Return the last index at which a text can be split and its parts normalized independently; 0 = none.

    After a line end, else before an ASCII character, which no normal form joins to what precedes it.
    """
    return text.rfind("\n") + 1 or next((i for i in range(len(text) - 1, 0, -1) if text[i] < "\x80"), 0)
