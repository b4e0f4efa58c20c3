"""Reading prompts and texts to score the way corpora are read."""

import sys
from pathlib import Path

from charrnn.errors import CorpusError
from charrnn.vocab import Vocab

_BYTE_ORDER_MARK = "\ufeff"


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
