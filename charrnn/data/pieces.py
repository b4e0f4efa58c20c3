"""What the passes over a corpus exchange: the rules of decoding, pieces of text, and a trace of what was read."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


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
class Trace:
    """What reading a task records.

    Attributes:
        checksum: CRC-32 of the bytes read.
        transcoded: Whether they were in another encoding than UTF-8.
        replaced: Number of invalid sequences replaced.
        replaced_at: Place of the first of them.
    """

    checksum: int = 0
    transcoded: bool = False
    replaced: int = 0
    replaced_at: str = ""

    def add_replaced(self, count: int, place: str) -> None:
        """Count replaced sequences, the first at `place`."""
        self.replaced_at = self.replaced_at or (place if count else "")
        self.replaced += count


@dataclass(frozen=True, slots=True)
class Piece:
    """A non-empty piece of a corpus: `utf8` alone (ASCII text, or bytes of a binary corpus), or `text`.

    Beside a text, `utf8` is its UTF-8 where the file has just these bytes.
    """

    text: str | None = None
    utf8: bytes | None = None

    def raw(self) -> bytes:
        """Return the piece as UTF-8."""
        if self.utf8 is not None:
            return self.utf8
        assert self.text is not None
        return self.text.encode()

    def symbols(self) -> NDArray[np.unsignedinteger]:
        """Return (n,) code points or bytes, as uint8 or uint32."""
        if self.text is None:
            return np.frombuffer(self.utf8 or b"", np.uint8)
        return np.frombuffer(self.text.encode("utf-32-le"), "<u4")

    def contains(self, character: str) -> bool:
        """Return whether the piece contains `character`."""
        return character.encode() in (self.utf8 or b"") if self.text is None else character in self.text

    def ends_line(self) -> bool:
        """Return whether the last character is a newline."""
        return (self.utf8 or b"").endswith(b"\n") if self.text is None else self.text.endswith("\n")
