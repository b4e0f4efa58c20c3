"""Reading prompts and texts to score the way corpora are read, and showing generated text on a terminal."""

import sys
from pathlib import Path

from charrnn.errors import CorpusError
from charrnn.vocab import Vocab

_BYTE_ORDER_MARK = "\ufeff"
# What a terminal interprets: control characters, other line ends, and marks that change the direction of writing.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {c: repr(chr(c))[1:-1] for c in _CONTROLS if chr(c) not in "\n\t"}


def read_bytes(source: str, what: str) -> bytes:
    """Return the bytes of a file, or of standard input for `-`; `what` names it in messages. Raises: CorpusError."""
    if source == "-" and sys.stdin is None:
        raise CorpusError(f"cannot read {what} from standard input: it is closed; name a file instead")
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {what} {source}: {error.strerror}") from None


def decode(raw: bytes, what: str, vocab: Vocab) -> str:
    """Decode UTF-8; for a character vocabulary, drop a byte order mark and normalise newlines to \\n.

    A byte vocabulary keeps newlines as they are. Raises: CorpusError that names the first invalid byte.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{what} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); convert it first, for "
            "example with: iconv -f latin1 -t utf-8"
        ) from None
    if vocab.kind == "bytes":
        return text
    return text.removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def escape_control(text: str) -> str:
    """Escape everything in a generated text that a terminal would interpret."""
    return text.translate(_ESCAPES)
