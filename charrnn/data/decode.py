"""Bytes to normalized text, incrementally: encodings, invalid bytes, line ends, Unicode normal forms."""

import codecs
import io
import re
import threading
import unicodedata
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

from charrnn.data.pieces import Piece, Rules, Trace
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
_MAX_HELD = 1 << 24  # characters that wait for the end of a line to be normalized
_REPLACE_AND_RECORD = "charrnn.replace"
_SURROGATES = re.compile("[\ud800-\udfff]")

_replaced = threading.local()  # .starts: where the invalid sequences of one decode call began


def detect_encoding(head: bytes) -> str:
    """Return the codec of a file by its first 4 bytes: that of its byte order mark, else UTF-8."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), "utf-8")


def is_utf8(encoding: str) -> bool:
    """Return whether `encoding` names UTF-8."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def last_cut(raw: bytes, rules: Rules) -> int:
    """Return the last offset at which UTF-8 can be split and the parts decoded independently; 0 if there is none.

    After a line end, else before the first byte of a character, where an invalid sequence ends as well. With
    normalization before an ASCII character, which no normal form joins to what precedes it.

    Args:
        raw: UTF-8, which may begin and end within a character, or be invalid.
        rules: The corpus's rules.
    """
    if after_line := raw.rfind(b"\n") + 1:
        return after_line
    mask, other = (0x80, 0x80) if rules.normalize != "none" else (0xC0, 0x80)
    return next((i for i in range(len(raw) - 1, 0, -1) if raw[i] & mask != other), 0)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _replaced.starts.append(error.start)
    return _REPLACEMENT, error.end


codecs.register_error(_REPLACE_AND_RECORD, _replace)


class _Codec:
    """An incremental decoder that reports invalid bytes by their offset in the file."""

    def __init__(self, encoding: str, rules: Rules, name: str, trace: Trace, offset: int = 0) -> None:
        self._name, self._trace, self._offset = name, trace, offset
        self._label = codecs.lookup(encoding).name.upper()
        errors = _REPLACE_AND_RECORD if rules.invalid == "replace" else "strict"
        self._decoder: Any = codecs.getincrementaldecoder("utf-8" if is_utf8(encoding) else encoding)(errors)
        self.has_replaced = False

    @property
    def pending(self) -> bytes:
        """The bytes of an incomplete character at the end."""
        return self._decoder.getstate()[0]

    def skip(self, count: int) -> None:
        """Count bytes that were decoded without this codec."""
        self._offset += count

    def decode(self, chunk: bytes, final: bool) -> str:
        """Decode a chunk. Raises: CorpusError for invalid bytes, when they are not to be replaced."""
        _replaced.starts = []
        first = self._offset - len(self.pending)
        try:
            text: str = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise CorpusError(self._message(error.object[error.start], first + error.start)) from error
        except UnicodeError as error:
            remedy = "name its byte order, as in utf-16-le" if "BOM" in str(error) else "name another encoding"
            raise CorpusError(f"{self._name} is not {self._label} text: {error}; {remedy}") from error
        if _replaced.starts:
            self.has_replaced = True
            self._trace.add_replaced(len(_replaced.starts), f"byte {first + _replaced.starts[0]} of {self._name}")
        self._offset += len(chunk)
        return text

    def _message(self, byte: int, offset: int) -> str:
        return (
            f"{self._name} is not {self._label} text: byte 0x{byte:02x} at offset {offset}; name its encoding with "
            "--encoding, replace such bytes by U+FFFD with --set data.invalid=replace, exclude the file, or read bytes "
            "with --set data.vocab=bytes"
        )


def transcode(chunks: Iterator[bytes], encoding: str, rules: Rules, name: str, trace: Trace) -> Iterator[bytes]:
    """Convert a file's chunks to UTF-8; those of UTF-8 are passed on, valid or not.

    Args:
        chunks: The file's bytes.
        encoding: Codec, or auto: that of the byte order mark.
        rules: The corpus's rules.
        name: File, for messages.
        trace: Records the replaced sequences.

    Raises:
        CorpusError: Bytes are invalid, and not to be replaced.
    """
    head = b""
    while len(head) < _LONGEST_MARK and (chunk := next(chunks, b"")):
        head += chunk
    if encoding == "auto":
        encoding = detect_encoding(head)
    if is_utf8(encoding):
        yield head
        yield from chunks
        return
    trace.transcoded = True
    codec = _Codec(encoding, rules, name, trace)
    for chunk in chain((head,), chunks, (b"",)):
        if text := _without_surrogates(codec.decode(chunk, not chunk), rules, name):
            yield text.encode()


def _without_surrogates(text: str, rules: Rules, name: str) -> str:
    """Replace or refuse surrogates, which some codecs (utf-7, raw_unicode_escape) let through."""
    if rules.invalid == "replace":
        return _SURROGATES.sub(_REPLACEMENT, text)
    if found := _SURROGATES.search(text):
        what = f"a lone surrogate, U+{ord(found[0]):04X}, which is not a character"
        raise CorpusError(f"{name} has {what}; replace it with --set data.invalid=replace")
    return text


class Utf8Decoder:
    """Decodes and normalizes UTF-8 chunk by chunk."""

    def __init__(self, rules: Rules, name: str, trace: Trace, *, begins: bool = True, offset: int = 0) -> None:
        """Create the decoder of a text, or of the rest of one.

        Args:
            rules: The corpus's rules.
            name: File, for messages.
            trace: Records the replaced sequences.
            begins: Whether the text begins here, perhaps with a byte order mark.
            offset: Byte offset of the first chunk in the file.
        """
        self._codec = _Codec("utf-8", rules, name, trace, offset)
        self._rules, self._name, self._begun = rules, name, not begins
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True) if rules.newlines == "universal" else None
        self._after_return = False
        self._held = ""

    def feed(self, chunk: bytes, final: bool = False) -> Piece | None:
        """Return the text that `chunk` completes; `final` flushes. Raises: CorpusError for invalid bytes."""
        pending = self._codec.pending
        if not pending and self._is_unchanged(chunk):
            self._codec.skip(len(chunk))
            self._begun = self._begun or bool(chunk)
            return Piece(utf8=chunk) if chunk else None
        text, utf8 = self._codec.decode(chunk, final), None
        if not self._codec.has_replaced:
            given = pending + chunk
            utf8 = given[: len(given) - len(self._codec.pending)]
        if text and not self._begun:
            self._begun = True
            if text.startswith(_BYTE_ORDER_MARK):
                text, utf8 = text[1:], None
        if self._newlines and (self._after_return or "\r" in text):
            self._after_return = not final and (text.endswith("\r") or (self._after_return and not text))
            text, utf8 = self._newlines.decode(text, final), None
        if self._rules.normalize != "none":
            text, utf8 = self._normalize(self._rules.normalize, self._held + text, final), None
        return Piece(text, utf8) if text else None

    def _is_unchanged(self, chunk: bytes) -> bool:
        return (
            self._rules.normalize == "none"
            and not self._after_return
            and chunk.isascii()
            and not (self._newlines and b"\r" in chunk)
        )

    def _normalize(self, form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str, final: bool) -> str:
        cut = len(text)
        if not final:
            cut = text.rfind("\n") + 1 or next((i for i in range(len(text) - 1, 0, -1) if text[i] < "\x80"), 0)
        self._held = text[cut:]
        if len(self._held) > _MAX_HELD:
            what = f"more than {_MAX_HELD} characters without a line end or an ASCII character"
            raise CorpusError(f"{self._name} has {what}; exclude it, or set data.normalize=none")
        return unicodedata.normalize(form, text[:cut])
