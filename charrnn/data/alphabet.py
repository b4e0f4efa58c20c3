"""Which vocabulary a corpus gets: its own characters, those that are frequent enough, the bytes, or a file's."""

import difflib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from charrnn.config import KEEP, DataConfig
from charrnn.data.scanning import Scan, has_id
from charrnn.errors import CorpusError, VocabError, listing
from charrnn.io import expanded, reading
from charrnn.vocab import Vocab

# Unicode 16 has 155,000 characters: a text with more different ones is none.
MOST_SYMBOLS = 1 << 18
RARE = "\ufffd"  # Unicode's own replacement character
_LARGEST_FILE = 64 << 20
_SMALLER = "fold rare ones into one with --set data.min_count=2 or more, or read bytes with --set data.vocab=bytes"


def given_vocabulary(data: DataConfig) -> Vocab | None:
    """The vocabulary that does not depend on the corpus: the bytes, or a file's; None when the corpus decides.

    Raises: CorpusError or VocabError when the file of data.vocab can't be used.
    """
    end = data.document_end or None
    if data.vocab in ("chars", KEEP):
        return None
    vocab = Vocab.of_bytes() if data.vocab == "bytes" else _read(expanded(data.vocab), data.vocab)
    if end and vocab.kind == "chars" and end not in vocab.symbols:
        raise VocabError(f"data.vocab {data.vocab} lacks data.document_end {end!r}; add it there, or choose another")
    if data.unknown == "replace" and vocab.replacement is None:
        what = f"data.vocab {data.vocab} has no replacement entry for data.unknown=replace"
        raise VocabError(f"{what}; use skip, or a JSON vocabulary with one")
    return replace(vocab, document_end=end)


def _read(path: Path, given: str) -> Vocab:
    with reading(path):
        is_file = path.is_file()
    if not is_file:
        close = difflib.get_close_matches(given, ["chars", "bytes", KEEP], n=1)
        nearest = f" (nearest: {close[0]})" if close else ""
        raise CorpusError(f"data.vocab is chars, bytes, keep or a file, and there is no file {given!r}{nearest}")
    with reading(path):
        if path.stat().st_size > _LARGEST_FILE:
            raise VocabError(
                f"{path} is too large for a vocabulary: a JSON one, or the characters themselves, is meant"
            )
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VocabError(f"the vocabulary {path} is not UTF-8: byte {error.start}; save it as UTF-8") from error
    if text.lstrip().startswith("{") and '"kind"' in text:
        return _checked(Vocab.from_json(text), path)
    if not text:
        raise VocabError(f"the vocabulary {path} is empty; write the characters into it, each once or as a text")
    return _checked(Vocab.of_chars(text.replace("\r\n", "\n")), path)


def _checked(vocab: Vocab, path: Path) -> Vocab:
    if len(vocab) > MOST_SYMBOLS:
        raise VocabError(f"{path} has {len(vocab)} symbols, and {MOST_SYMBOLS} are the most")
    return vocab


def vocabulary_of(data: DataConfig, found: Scan, given: Vocab | None) -> tuple[Vocab, tuple[str, ...]]:
    """The corpus's vocabulary, and what the user should know of it. given: as given_vocabulary returned it.

    Raises: CorpusError when there are too many symbols, or the vocabulary lacks some of the corpus's.
    """
    if not found.num_chars:
        raise CorpusError(f"the corpus {data.source} is empty; name a text with something in it")
    end = data.document_end or None
    if given:
        return given, _compared(data, found, given)
    rare = (found.counts < data.min_count) & (found.symbols != (ord(end) if end else -1))  # (S,)
    if not rare.any():
        _refuse_many(data, len(found.symbols))
        return Vocab.of_chars(map(chr, found.symbols.tolist()), end), ()
    kept = {*map(chr, found.symbols[~rare].tolist()), RARE}
    _refuse_many(data, len(kept))
    cost = _share(found, rare & (found.symbols != ord(RARE)))
    note = f"data.min_count={data.min_count}: {rare.sum()} of {len(rare)} characters became U+FFFD, {cost}"
    return Vocab("chars", tuple(sorted(kept)), RARE, end), (note,)


def _refuse_many(data: DataConfig, symbols: int) -> None:
    if symbols > MOST_SYMBOLS:
        what = f"{symbols} different characters, and a vocabulary holds {MOST_SYMBOLS}"
        raise CorpusError(f"the corpus {data.source} has {what}; {_SMALLER}")


def _compared(data: DataConfig, found: Scan, vocab: Vocab) -> tuple[str, ...]:
    lacking = ~has_id(found.symbols, vocab)  # (S,)
    if not lacking.any():
        return ()
    names = [f"{chr(c)!r} (U+{c:04X})" for c in found.symbols[lacking].tolist()]
    what = f"{len(names)} character(s) that the vocabulary {data.vocab} lacks, {_share(found, lacking)}"
    if data.unknown == "error":
        remedy = "add them to it, or choose --set data.unknown=skip or, when it has a replacement entry, replace"
        raise CorpusError(f"the corpus {data.source} has {what}: {listing(names)}; {remedy}")
    done = "dropped" if data.unknown == "skip" else f"replaced with {vocab.replacement!r}"
    return (f"{what}, were {done}: {listing(names)}",)


def _share(found: Scan, chosen: NDArray[np.bool_]) -> str:
    count = int(found.counts[chosen].sum())
    return f"{count} of {found.num_chars} ({count / found.num_chars:.2g} of the text)"
