"""Text to ids on disk: read twice in bounded memory, encoded once, memory-mapped, split into train, val and test.

Pass one (scan) finds the symbols and the checksum, pass two (encode) writes the ids. A prepared corpus is found again
by the stamps of its files, or else by the text's checksum.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from charrnn.config import DataConfig
from charrnn.data import cache
from charrnn.data.decode import Replaced, Rules, read_texts
from charrnn.data.encode import IdTable, Scan, code_points, encode, scan
from charrnn.data.parts import Source
from charrnn.data.sources import find_source
from charrnn.data.stats import ngram_loss
from charrnn.data.vocabulary import build_vocabulary, given_vocabulary
from charrnn.errors import CorpusError
from charrnn.io import expand_user, lock, progress_bar, reading
from charrnn.vocab import Ids, Vocab
from charrnn.windows import split_bounds

# Of a cached corpus, this much is checked at the start; training checks every batch.
_CHECKED_PIECES, _CHECKED_IDS = 16, 1 << 20
LEAST_EVALUATED = 2  # one character to predict from, one to predict

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        name: Short, and safe in file names.
        source: Value of --data.
        vocab: Its vocabulary, of V symbols.
        sha256: Of the normalized text's UTF-8 (of the bytes for a byte vocabulary).
        num_chars: N, bytes for a byte vocabulary.
        split: Shares of train, val and test.
        ids: (N,) uint8, uint16 or uint32, read-only, memory-mapped.
        notes: Lines that the user should read.
    """

    name: str
    source: str
    vocab: Vocab
    sha256: str
    num_chars: int
    split: tuple[float, float, float]
    ids: Ids
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> Ids:
        """(N_train,) ids."""
        return self._part("train")

    @property
    def val(self) -> Ids:
        """(N_val,) ids."""
        return self._part("val")

    @property
    def test(self) -> Ids:
        """(N_test,) ids."""
        return self._part("test")

    @cached_property
    def ngram_loss(self) -> float | None:
        """Loss of an n-gram model on the validation split, in nats/char, computed once; None without that split."""
        if len(self.val) < LEAST_EVALUATED:
            return None
        return ngram_loss(self.train, self.val, len(self.vocab))

    def _part(self, name: str) -> Ids:
        return self.ids[slice(*split_bounds(self.num_chars, self.split)[name])]


def prepare(data: DataConfig) -> Corpus:
    """Return the corpus that `data` names, encoded and memory-mapped; of a machine's processes one prepares it.

    Raises:
        CorpusError: There is no such corpus, or it cannot be downloaded, read, stored or used.
    """
    given = given_vocabulary(data)
    rules, cache_dir = _rules(data, given), expand_user(data.cache_dir)
    source = find_source(data, binary=rules.binary)
    files = list(dict.fromkeys(part.path for part in source.parts if part.path))
    has_stamps = all(part.path for part in source.parts)
    began_ns, stamps = time.time_ns(), cache.stamps(files)
    options = {
        "parts": [part.name for part in source.parts],
        "text_field": data.text_field,
        "rules": asdict(rules),
        "vocab": given.to_json() if given else data.vocab,
        "min_count": data.min_count,
        "unknown": data.unknown,
    }
    record = cache.record_path(cache_dir, stamps, options)

    def check_unchanged() -> None:
        if cache.stamps(files) != stamps:
            raise _changed_error(source)

    def find() -> tuple[cache.Entry, tuple[str, ...]] | None:
        """Return the entry of files that were not touched since it was made, without reading them."""
        known = cache.recall(record) if has_stamps else None
        return known if known and known[0].is_complete(_folder(cache_dir, known[0])) else None

    def make() -> tuple[cache.Entry, tuple[str, ...]]:
        entry, notes = _make(data, source, rules, given, cache_dir, check_unchanged)
        check_unchanged()
        if has_stamps:
            cache.remember(record, stamps, began_ns, entry, notes)
        return entry, notes

    found = find()
    if not found:
        waiting = "waiting for another process, which is preparing the same corpus"
        with lock(record, lambda: _logger.info(waiting)):
            found = find() or make()
    entry, notes = found[0], source.notes + found[1]
    _refuse_small_splits(data, entry.num_ids)
    for note in notes:
        _logger.info(note)
    folder = _folder(cache_dir, entry)
    with reading(folder):
        ids = np.memmap(folder / entry.file, entry.vocab.dtype.newbyteorder("<"), mode="r")  # (N,)
    for start in range(0, len(ids), max(1, len(ids) // _CHECKED_PIECES)):
        check_ids(ids[start : start + _CHECKED_IDS], len(entry.vocab))
    return Corpus(source.name, data.source, entry.vocab, entry.sha256, entry.num_ids, data.split, ids, notes)


def find_parts(data: DataConfig) -> Source:
    """Return the parts of the corpus that `data` names. Raises: CorpusError, as `prepare` does."""
    return find_source(data, binary=_rules(data, given_vocabulary(data)).binary)


def check_ids(ids: Ids, num_symbols: int, origin: object = None) -> None:
    """Check that ids are below `num_symbols`, which those of a damaged file may not be.

    Args:
        ids: Ids of any shape.
        num_symbols: V.
        origin: The memory-mapped array that they are a copy of, if they are one.

    Raises:
        CorpusError: One of them is not.
    """
    largest = int(ids.max(initial=0))
    if largest >= num_symbols:
        file = getattr(ids if origin is None else origin, "filename", None) or "the prepared corpus"
        raise CorpusError(
            f"{file} is damaged: it has id {largest}, and the vocabulary {num_symbols} symbols; delete its folder and "
            "rerun the same command to prepare the text again"
        )


def _rules(data: DataConfig, given: Vocab | None) -> Rules:
    binary = given is not None and given.kind == "bytes"
    return Rules(binary, data.document_end, data.encoding, data.invalid, data.newlines, data.normalize)


def _folder(cache_dir: Path, entry: cache.Entry) -> Path:
    return cache_dir / "prepared" / entry.name


def _changed_error(source: Source) -> CorpusError:
    return CorpusError(f"{source.name} changed while it was read; run again when nothing writes to it")


def _make(
    data: DataConfig, source: Source, rules: Rules, given: Vocab | None, cache_dir: Path, check: Callable[[], None]
) -> tuple[cache.Entry, tuple[str, ...]]:
    """Read the corpus, and write its entry if it is not there.

    Args:
        data: The configuration.
        source: The corpus.
        rules: How its bytes become symbols.
        given: The vocabulary, unless the corpus decides it.
        cache_dir: Where the entry goes.
        check: Raises CorpusError if the corpus has changed since it was found.

    Returns:
        The entry, and notes for the user.
    """
    replaced, skip = Replaced(), data.unknown == "skip"
    with progress_bar(f"reading {source.name}", source.size) as advance:
        found = scan(read_texts(source.parts, rules, replaced), advance)
    vocab, notes = build_vocabulary(data, found, given)
    if replaced.count:
        what = f"{replaced.count} invalid byte sequence(s) were replaced with U+FFFD, the first at {replaced.first}"
        notes = (what, *notes)
    kept = np.isin(found.symbols, code_points(vocab)) if skip else slice(None)
    entry = cache.Entry(found.sha256, int(found.counts[kept].sum()), vocab, data.unknown)
    table = IdTable.of(vocab, skip=skip)
    _refuse_unusable(data, found, table, entry.num_ids)

    def write_ids(path: Path) -> None:
        with progress_bar(f"encoding {source.name}", entry.num_ids) as advance:
            if encode(read_texts(source.parts, rules, Replaced()), table, path, advance) != entry.num_ids:
                raise _changed_error(source)
        check()

    folder = _folder(cache_dir, entry)
    if not entry.is_complete(folder):
        cache.write(folder, entry, write_ids)
    return entry, notes


def _refuse_unusable(data: DataConfig, found: Scan, table: IdTable, num_chars: int) -> None:
    if not num_chars:
        raise CorpusError(
            f"the corpus {data.source} has none of the characters of {data.vocab}; use another data.vocab"
        )
    symbols = found.symbols if table.known is None else found.symbols[table.known.take(found.symbols, mode="clip")]
    if len(np.unique(table.of_symbols(symbols))) == 1:
        what = f"{num_chars} times the symbol {chr(symbols[0])!r}"
        if len(symbols) > 1:
            what = f"{num_chars} times the replacement of {len(symbols)} characters"
        raise CorpusError(f"the corpus {data.source} is {what} and nothing else; there is nothing to learn from it")


def _refuse_small_splits(data: DataConfig, num_chars: int) -> None:
    bounds = split_bounds(num_chars, data.split)
    for (part, (start, stop)), fraction in zip(bounds.items(), data.split, strict=True):
        if part != "train" and fraction > 0 and stop - start < LEAST_EVALUATED:
            what = f"{fraction:g} of {num_chars} characters is {stop - start}"
            remedy = f"evaluation needs {LEAST_EVALUATED}; use a longer text or another data.split"
            raise CorpusError(f"the {part} split of {data.source} is too small: {what}, and {remedy}")
