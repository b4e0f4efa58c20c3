"""From drawn ids to text that can be shown: complete characters only, nothing from a stop text or document end on."""

from collections import deque
from collections.abc import Sequence

from charrnn.vocab import Vocab


class TextWriter:
    """One stream's text.

    Args:
        vocab: Of the model that draws the ids.
        stops: The text ends before the one that is complete first; what may be the beginning of one is held back.
        past_end: Go on where a document ends, with its end in the text; else the text ends before it.

    Attributes:
        ended: Whether a stop text or document end was found.
        count: Ids whose text has been returned.
    """

    def __init__(self, vocab: Vocab, stops: Sequence[str] = (), past_end: bool = False) -> None:
        self.ended = False
        self.count = 0
        self._document_end = None if past_end else vocab.document_end
        self._decode = vocab.decoder()
        self._stops = tuple(stops)
        self._held = ""
        # How many characters each id added that is not counted yet; an id of a character vocabulary always adds 1.
        self._lengths: deque[int] | None = deque() if vocab.kind == "bytes" else None

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is certain once these are known."""
        pieces = [self._decode(i) for i in ids]
        if self._lengths is not None and not self.ended:
            self._lengths.extend(map(len, pieces))
        return self._write("".join(pieces), last=False)

    def end(self) -> str:
        """What was held back, when no more will come."""
        if self.ended:
            return ""
        text = self._write(self._decode(None), last=True)
        if self._lengths and not self.ended:  # bytes of an incomplete character, which come out as U+FFFD
            self.count += len(self._lengths)
            self._lengths.clear()
        return text

    def _write(self, text: str, last: bool) -> str:
        if self.ended:
            return ""
        if self._document_end is not None and self._document_end in text:
            text, last = text.partition(self._document_end)[0], True
            self.ended = True
        self._held += text
        # By where they end, so that it does not matter how the ids are divided into calls.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._counted(self._held[: min(found)[1]])
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return self._counted(text)

    def _counted(self, text: str) -> str:
        if self._lengths is None:
            self.count += len(text)
            return text
        left = len(text)
        while left > 0 and self._lengths:
            left -= self._lengths.popleft()
            self.count += 1
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next(k for k in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:k]))
