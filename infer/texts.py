"""Reading what a user hands over, prompts and texts to score, as the corpora that models learn from are read."""

import sys
from pathlib import Path

from charrnn.errors import CorpusError
from charrnn.vocab import Vocab

_BYTE_ORDER_MARK = "\ufeff"
# What a terminal acts on instead of showing it: control characters, other line ends, and what turns the writing around.
_ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {c: repr(chr(c))[1:-1] for c in _ACTING if chr(c) not in "\n\t"}


def read_bytes(source: str, what: str) -> bytes:
    """The bytes of a file, or of standard input for `-`. what: its name in messages. Raises: CorpusError."""
    if source == "-" and sys.stdin is None:
        raise CorpusError(f"cannot read {what} from standard input: it is closed; name a file instead")
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {what} {source}: {error.strerror}") from None


def decode(raw: bytes, what: str, vocab: Vocab) -> str:
    """UTF-8 bytes to text; for a character vocabulary without a byte order mark, and with \\n as the only line end.

    A byte vocabulary has learned line ends as they are. Raises: CorpusError that names the first byte at fault.
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


def on_terminal(text: str) -> str:
    """Text that a model wrote, with everything spelled out that a terminal would obey."""
    return text.translate(_SHOWN)
