"""From bytes to normalised text, in pieces of any size: encodings, invalid bytes, line ends, Unicode's normal forms.

Where a text may be cut, so that its parts are decoded apart and still give the same text, is known here as well.
"""

import codecs
import io
import threading
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import CorpusError

Form = Literal["none", "NFC", "NFD", "NFKC", "NFKD"]

_BYTE_ORDER_MARK = "\ufeff"
_REPLACEMENT = "\ufffd"
_LONGEST_MARK = 4
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MOST_HELD = 1 << 20  # characters
_REPLACING = "charrnn.replace"
# Vowels and final consonants of Hangul, and those of Kirat Rai (Unicode 16): letters that join the one before.
_JOINING_LETTERS = ((0x1100, 0x11FF), (0xA960, 0xA97F), (0xD7B0, 0xD7FF), (0x16D40, 0x16D7F))

_found = threading.local()


@dataclass(frozen=True)
class Rules:
    """How a corpus's bytes become its symbols; the fields of DataConfig of the same names.

    binary: the bytes themselves are the symbols, and the other rules but document_end do not apply.
    """

    binary: bool = False
    document_end: str = ""
    encoding: str = "auto"
    invalid: Literal["refuse", "replace"] = "refuse"
    newlines: Literal["universal", "keep"] = "universal"
    normalize: Form = "none"


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a corpus, not empty: `utf8` alone (ASCII text, or any bytes of a binary corpus), or `text`.

    With a text, utf8 is its UTF-8 where that is at hand, because the file had just these bytes.
    """

    text: str | None = None
    utf8: bytes | None = None

    def raw(self) -> bytes:
        """The piece in UTF-8."""
        if self.utf8 is not None:
            return self.utf8
        assert self.text is not None
        return self.text.encode()

    def symbols(self) -> NDArray[np.unsignedinteger]:
        """(n,) the piece's code points, or bytes: uint8, or uint32 where there are more than 256."""
        if self.text is None:
            return np.frombuffer(self.utf8 or b"", np.uint8)
        return np.frombuffer(self.text.encode("utf-32-le"), "<u4")

    def holds(self, character: str) -> bool:
        """Whether `character` is in it."""
        return character.encode() in (self.utf8 or b"") if self.text is None else character in self.text

    def ends_line(self) -> bool:
        """Whether its last character is a newline."""
        return (self.utf8 or b"").endswith(b"\n") if self.text is None else self.text.endswith("\n")


def detected(head: bytes) -> str:
    """The codec of a file that begins with `head` (4 bytes, or all of it): by its byte order mark, else UTF-8."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), "utf-8")


def is_utf8(encoding: str) -> bool:
    """Whether the codec of that name is UTF-8's, which any file of ASCII text is read with as well."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


@lru_cache(1 << 14)
def starts_anew(character: str) -> bool:
    """Whether no normal form ever joins `character` to, or moves it past, what stands before it.

    A careful choice among those of which Unicode says so (UAX 15, section 9.1: ccc = 0 and Quick_Check = Yes), tested
    over all of them. A newline is not among them, since a carriage return before it belongs to it.
    """
    code = ord(character)
    if code < 0x80:
        return character != "\n"
    if any(low <= code <= high for low, high in _JOINING_LETTERS):
        return False
    marks_or_others = unicodedata.category(character)[0] in "MC" or unicodedata.combining(character)
    return not marks_or_others and not unicodedata.decomposition(character)


def last_cut(text: str) -> int:
    """The last place found at which `text` can be cut without changing what its parts become; 0 when there is none."""
    if after_line := text.rfind("\n") + 1:
        return after_line
    return next((i for i in range(len(text) - 1, 0, -1) if starts_anew(text[i])), 0)


def last_cut_of_utf8(raw: bytes) -> int:
    """As last_cut, for UTF-8 that may begin and end within a character, or not be valid."""
    if after_line := raw.rfind(b"\n") + 1:
        return after_line
    text = raw.decode("utf-8", "surrogateescape")
    return len(text[: last_cut(text)].encode("utf-8", "surrogateescape"))


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _found.starts.append(error.start)
    return _REPLACEMENT, error.end


codecs.register_error(_REPLACING, _replace)


class TextDecoder:
    """A text from its bytes (`feed`) or from characters (`feed_text`), in pieces, normalised by `rules`.

    replaced: how many invalid sequences were replaced, the first at byte `first_replaced`.
    """

    def __init__(
        self, rules: Rules, name: str, *, encoding: str = "auto", begins: bool = True, offset: int = 0
    ) -> None:
        """name: for messages. encoding: a codec, or auto. begins: with the text's first byte; else at byte `offset`."""
        self._rules, self._name, self._offset = rules, name, offset
        self._codec: Any = None
        self._head: bytes | None = b"" if encoding == "auto" else None
        if encoding != "auto":
            self._open(encoding)
        self._begun = not begins
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True) if rules.newlines == "universal" else None
        self._after_return = False
        self._held = ""
        self.replaced = 0
        self.first_replaced = 0

    def _open(self, encoding: str) -> None:
        self._label = codecs.lookup(encoding).name.upper()
        self._is_utf8 = is_utf8(encoding)
        errors = _REPLACING if self._rules.invalid == "replace" else "strict"
        self._codec = codecs.getincrementaldecoder("utf-8" if self._is_utf8 else encoding)(errors)

    def feed(self, chunk: bytes, final: bool = False) -> Piece | None:
        """What `chunk` completes; `final` flushes the rest. Raises: CorpusError where the bytes are invalid."""
        if self._head is not None:
            chunk = self._head + chunk
            if len(chunk) < _LONGEST_MARK and not final:
                self._head = chunk
                return None
            self._head = None
            self._open(detected(chunk))
        if self._is_plain(chunk):
            self._offset += len(chunk)
            self._begun = self._begun or bool(chunk)
            return Piece(utf8=chunk) if chunk else None
        held_back = self._codec.getstate()[0]
        text = self._decoded(chunk, final, len(held_back))
        utf8: bytes | None = None
        if self._is_utf8 and not self.replaced:
            taken = held_back + chunk
            utf8 = taken[: len(taken) - len(self._codec.getstate()[0])]
        return self._normalized(text, utf8, final)

    def feed_text(self, text: str, final: bool = False) -> Piece | None:
        """As `feed`, for characters that were decoded by others: JSON may name half of a surrogate pair."""
        return self._normalized(self._without_surrogates(text), None, final)

    def _is_plain(self, chunk: bytes) -> bool:
        """Whether the chunk is its own text, with nothing held back before it."""
        return (
            self._is_utf8
            and self._rules.normalize == "none"
            and not self._after_return
            and chunk.isascii()
            and not (self._newlines and b"\r" in chunk)
            and not self._codec.getstate()[0]
        )

    def _decoded(self, chunk: bytes, final: bool, held_back: int) -> str:
        _found.starts = []
        first = self._offset - held_back
        try:
            text: str = self._codec.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise CorpusError(self._invalid_message(error.object[error.start], first + error.start)) from error
        except UnicodeError as error:
            remedy = "its order of bytes must be named, as in utf-16-le" if "BOM" in str(error) else "name another"
            raise CorpusError(f"{self._name} is not {self._label} text: {error}; {remedy}") from error
        self._note(len(_found.starts), first + _found.starts[0] if _found.starts else 0)
        self._offset += len(chunk)
        return text if self._is_utf8 else self._without_surrogates(text)

    def _note(self, count: int, where: int) -> None:
        if count and not self.replaced:
            self.first_replaced = where
        self.replaced += count

    def _invalid_message(self, byte: int, offset: int) -> str:
        where = f"byte 0x{byte:02x} at offset {offset}"
        remedy = (
            "name its encoding with --encoding, put U+FFFD in place of such bytes with --set data.invalid=replace, "
            "leave the file out, or read bytes with --set data.vocab=bytes"
        )
        return f"{self._name} is not {self._label} text: {where}; {remedy}"

    def _without_surrogates(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self._rules.invalid == "refuse":
                what = f"half a surrogate pair, U+{ord(text[error.start]):04X}, which is no character"
                raise CorpusError(f"{self._name} has {what}; replace it with --set data.invalid=replace") from error
            mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            self._note(mended.count(_REPLACEMENT) - text.count(_REPLACEMENT), self._offset)
            return mended
        return text

    def _normalized(self, text: str, utf8: bytes | None, final: bool) -> Piece | None:
        if text and not self._begun:
            self._begun = True
            if text.startswith(_BYTE_ORDER_MARK):
                text, utf8 = text[1:], None
        if self._newlines and (self._after_return or "\r" in text):
            utf8 = None
            self._after_return = not final and (text.endswith("\r") or (self._after_return and not text))
            text = self._newlines.decode(text, final)
        if self._rules.normalize != "none":
            text, utf8 = self._in_form(self._rules.normalize, self._held + text, final), None
        return Piece(text, utf8) if text else None

    def _in_form(self, form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str, final: bool) -> str:
        cut = len(text) if final else last_cut(text)
        self._held = text[cut:]
        if not cut and len(text) > _MOST_HELD:
            what = f"more than {_MOST_HELD} characters up to byte {self._offset} that all depend on each other"
            raise CorpusError(f"{self._name} has {what} in form {form}; leave it out, or set data.normalize=none")
        return unicodedata.normalize(form, text[:cut])
