"""Vocab: the symbols of a model, and the conversion between text and ids. No torch."""

import codecs
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from charrnn.errors import VocabError, listing

Ids = NDArray[np.unsignedinteger]
Unknown = Literal["error", "skip", "replace"]

_CODE_POINTS = 0x110000
_ABSENT = -1


@dataclass(frozen=True)
class Vocab:
    """An ordered set of symbols; a symbol's id is its position.

    Attributes:
        kind: `chars` (the corpus's characters, sorted by code point; those added by fine-tuning come last) or `bytes`
            (the 256 byte values; text is converted to UTF-8, so that nothing is unknown).
        symbols: The characters; empty for bytes.
        replacement: The symbol that stands for unknown characters under `unknown="replace"`, or None.
        document_end: The symbol after which the hidden state is reset, or None.
    """

    kind: Literal["chars", "bytes"]
    symbols: tuple[str, ...] = ()
    replacement: str | None = None
    document_end: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("chars", "bytes"):
            raise VocabError(f"vocabulary kind must be chars or bytes, not {self.kind!r}")
        if self.kind == "bytes" and (self.symbols or self.replacement):
            raise VocabError("a byte vocabulary has no symbols of its own")
        if self.kind == "chars":
            if not self.symbols:
                raise VocabError("a character vocabulary needs at least one symbol: the text is empty")
            if any(not isinstance(s, str) or len(s) != 1 for s in self.symbols):
                raise VocabError("every symbol of a character vocabulary must be one character")
            if len(set(self.symbols)) != len(self.symbols):
                raise VocabError("a vocabulary's symbols must be distinct")
            if self.replacement is not None and self.replacement not in self.symbols:
                raise VocabError(f"the replacement {self.replacement!r} is not one of the vocabulary's symbols")
        end, known = self.document_end, bytes(range(128)).decode() if self.kind == "bytes" else self.symbols
        if end is not None and (not isinstance(end, str) or len(end) != 1 or end not in known):
            raise VocabError(f"the document end {end!r} is not one of the vocabulary's symbols")

    @classmethod
    def of_chars(cls, characters: Iterable[str], document_end: str | None = None) -> "Vocab":
        """Return the vocabulary of the distinct `characters`, sorted by code point."""
        return cls("chars", tuple(sorted(set(characters))), document_end=document_end)

    @classmethod
    def of_bytes(cls, document_end: str | None = None) -> "Vocab":
        """Return the vocabulary of the 256 bytes, which encodes any text and any file."""
        return cls("bytes", document_end=document_end)

    def extended_by(self, other: "Vocab") -> "Vocab":
        """Return this character vocabulary with the missing symbols of `other` appended.

        The replacement entry is this one's, else `other`'s.
        """
        known = set(self.symbols)
        added = tuple(s for s in other.symbols if s not in known)
        replacement = self.replacement if self.replacement is not None else other.replacement
        return Vocab("chars", self.symbols + added, replacement, self.document_end)

    def __len__(self) -> int:
        return 256 if self.kind == "bytes" else len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """The narrowest unsigned integer type that holds every id."""
        return np.min_scalar_type(len(self) - 1)

    @property
    def start_id(self) -> int:
        """The id that generation without a prompt starts from: the document end, else a newline, else the first."""
        if (end := self.document_end_id) is not None:
            return end
        if self.kind == "bytes":
            return ord("\n")
        return self.symbols.index("\n") if "\n" in self.symbols else 0

    def begun(self, prompt: Ids) -> Ids:
        """Return what generation reads first: a prompt's ids (N,), or the start id when there are none.

        With documents a prompt is the beginning of one, so that the end of the previous one precedes it.
        """
        if len(prompt) and self.document_end_id in (None, prompt[0]):
            return prompt
        return np.concatenate([np.array([self.start_id], self.dtype), prompt])

    @property
    def document_end_id(self) -> int | None:
        """The id after which the hidden state is reset, or None."""
        if self.document_end is None:
            return None
        return ord(self.document_end) if self.kind == "bytes" else self.symbols.index(self.document_end)

    @cached_property
    def _id_of_code_point(self) -> NDArray[np.int32]:
        table = np.full(_CODE_POINTS, _ABSENT, np.int32)
        table[[ord(s) for s in self.symbols]] = np.arange(len(self.symbols), dtype=np.int32)
        return table

    def encode(self, text: str, unknown: Unknown = "error") -> Ids:
        """Encode a text.

        Args:
            text: The text.
            unknown: What to do with characters outside the vocabulary: "error", "skip" or "replace".

        Returns:
            (N,) ids of type `dtype`; N is the number of characters (of UTF-8 bytes for a byte vocabulary).

        Raises:
            VocabError: A character is unknown and not to be skipped, there is no replacement for it, or an argument
                is invalid.
        """
        if not isinstance(text, str):
            raise VocabError(f"the text must be a str, not {type(text).__name__}")
        if unknown not in ("error", "skip", "replace"):
            raise VocabError(f"unknown must be 'error', 'skip' or 'replace', not {unknown!r}")
        if self.kind == "bytes":
            return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)  # (N,)
        ids = self._id_of_code_point[code_points]  # (N,)
        missing = ids == _ABSENT
        if missing.any():
            if unknown == "skip":
                ids = ids[~missing]
            elif unknown == "replace" and self.replacement is not None:
                ids[missing] = self.symbols.index(self.replacement)
            else:
                raise VocabError(self._unknown_message(code_points[missing], unknown))
        return ids.astype(self.dtype)

    def unknown_in(self, text: str) -> list[str]:
        """Return the distinct characters of `text` outside the vocabulary, sorted."""
        return [] if self.kind == "bytes" else sorted(set(text) - set(self.symbols))

    def _unknown_message(self, code_points: NDArray[np.uint32], unknown: Unknown) -> str:
        names = [f"{chr(c)!r} (U+{c:04X})" for c in sorted(set(code_points.tolist()))]
        what = f"{len(code_points)} character(s) not in the model's vocabulary of {len(self)}: {listing(names)}"
        if unknown == "replace":
            return f"{what}; this vocabulary has no replacement entry, so use 'skip' to drop them"
        return f"{what}; drop them with --unknown skip, or train on a text that has them"

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; bytes that are not valid UTF-8 become U+FFFD."""
        decode = self.decoder()
        return "".join(decode(int(i)) for i in ids) + decode(None)

    def decoder(self) -> Callable[[int | None], str]:
        """Return a function from one id to the text that it completes, for streaming.

        With a byte vocabulary it returns "" until the last byte of a UTF-8 sequence. Calling it with None flushes:
        an incomplete sequence becomes U+FFFD.
        """
        if self.kind == "chars":
            return lambda i: "" if i is None else self.symbols[i]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda i: utf8.decode(b"", final=True) if i is None else utf8.decode(bytes((i,)))

    def to_json(self) -> str:
        """Return the vocabulary as a JSON object, as in checkpoints and model files."""
        fields: dict[str, object] = {"kind": self.kind}
        if self.kind == "chars":
            fields |= {"symbols": list(self.symbols), "replacement": self.replacement}
        if self.document_end is not None:
            fields["document_end"] = self.document_end
        return json.dumps(fields, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Vocab":
        """Parse the output of `to_json`. Raises: VocabError."""
        try:
            fields = json.loads(text)
            symbols = tuple(fields.get("symbols", ()))
            return cls(fields["kind"], symbols, fields.get("replacement"), fields.get("document_end"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise VocabError(
                f"not a vocabulary: {error!r}; the file was written by another program or damaged"
            ) from None
