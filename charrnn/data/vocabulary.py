"""The vocabulary of a corpus: its own characters, those that are frequent enough, the 256 bytes, or a file's."""

import difflib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from charrnn.config import KEEP, DataConfig
from charrnn.data.encode import Scan, code_points
from charrnn.errors import CorpusError, VocabError, listing
from charrnn.io import expand_user, reading
from charrnn.vocab import Vocab

MAX_SYMBOLS = 1 << 18  # Unicode 16 has 155,000 characters
RARE = "\ufffd"  # Unicode's replacement character
_MAX_FILE_BYTES = 64 << 20


def given_vocabulary(data: DataConfig) -> Vocab | None:
    """Return the vocabulary that does not depend on the corpus: the bytes, or a file's; None when the corpus decides.

    Raises:
        CorpusError: There is no such file.
        VocabError: It is not a vocabulary, or lacks an entry that an option needs.
    """
    end = data.document_end or None
    if data.vocab in ("chars", KEEP):
        return None
    vocab = Vocab.of_bytes() if data.vocab == "bytes" else _read(expand_user(data.vocab), data.vocab)
    if end and vocab.kind == "chars" and end not in vocab.symbols:
        raise VocabError(f"data.vocab {data.vocab} lacks data.document_end {end!r}; add it there, or choose another")
    if data.unknown == "replace" and vocab.replacement is None:
        what = f"data.vocab {data.vocab} has no replacement entry for data.unknown=replace"
        raise VocabError(f"{what}; use skip, or a JSON vocabulary with one")
    return replace(vocab, document_end=end)


def _read(path: Path, given: str) -> Vocab:
    with reading(path):
        if not path.is_file():
            close = difflib.get_close_matches(given, ["chars", "bytes", KEEP], n=1)
            nearest = f" (nearest: {close[0]})" if close else ""
            raise CorpusError(f"data.vocab is chars, bytes, keep or a file, and there is no file {given!r}{nearest}")
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise VocabError(f"{path} has {size} bytes, and a vocabulary file at most {_MAX_FILE_BYTES}; name another")
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VocabError(f"the vocabulary {path} is not UTF-8: byte {error.start}; save it as UTF-8") from error
    if not text:
        raise VocabError(f"the vocabulary {path} is empty; write the characters into it, each once or as a text")
    is_json = text.lstrip().startswith("{") and '"kind"' in text
    vocab = Vocab.from_json(text) if is_json else Vocab.of_chars(text.replace("\r\n", "\n"))
    if len(vocab) > MAX_SYMBOLS:
        raise VocabError(f"{path} has {len(vocab)} symbols, and a vocabulary at most {MAX_SYMBOLS}; name another")
    return vocab


def build_vocabulary(data: DataConfig, found: Scan, given: Vocab | None) -> tuple[Vocab, tuple[str, ...]]:
    """Return the corpus's vocabulary, and notes for the user.

    Args:
        data: The configuration.
        found: Pass one over the corpus.
        given: What `given_vocabulary` returned.

    Raises:
        CorpusError: There are too many symbols, or the given vocabulary lacks some of the corpus's.
    """
    if not found.num_chars:
        raise CorpusError(f"the corpus {data.source} is empty; name a text with something in it")
    end = data.document_end or None
    if given:
        return given, _check_known(data, found, given)
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
    if symbols > MAX_SYMBOLS:
        what = f"{symbols} different characters, and a vocabulary holds {MAX_SYMBOLS}"
        remedy = "merge rare ones with --set data.min_count=2 or more, or read bytes with --set data.vocab=bytes"
        raise CorpusError(f"the corpus {data.source} has {what}; {remedy}")


def _check_known(data: DataConfig, found: Scan, vocab: Vocab) -> tuple[str, ...]:
    missing = ~np.isin(found.symbols, code_points(vocab))  # (S,)
    if not missing.any():
        return ()
    names = [f"{chr(c)!r} (U+{c:04X})" for c in found.symbols[missing].tolist()]
    what = f"{len(names)} character(s) missing from the vocabulary {data.vocab}, {_share(found, missing)}"
    if data.unknown == "error":
        remedy = "add them to it, or choose --set data.unknown=skip or, when it has a replacement entry, replace"
        raise CorpusError(f"the corpus {data.source} has {what}: {listing(names)}; {remedy}")
    done = "dropped" if data.unknown == "skip" else f"replaced with {vocab.replacement!r}"
    return (f"{what}, were {done}: {listing(names)}",)


def _share(found: Scan, chosen: NDArray[np.bool_]) -> str:
    count = int(found.counts[chosen].sum())
    return f"{count} of {found.num_chars} ({count / found.num_chars:.2g} of the text)"
