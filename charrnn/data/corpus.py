"""Text to ids on disk: read in pieces on all cores, encoded once, memory-mapped, split into train, val and test.

Pass one (scan) finds the symbols and the checksum, pass two (encode) writes the ids; neither holds more than a few MB a
core. A prepared corpus is found again by the text's checksum, or, when it is large, by its files' stamps.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from charrnn.config import DataConfig
from charrnn.cores import cores
from charrnn.data import cache
from charrnn.data.encode import IdTable, encode, num_ids
from charrnn.data.parts import Source
from charrnn.data.pieces import Rules
from charrnn.data.scan import Scan, scan
from charrnn.data.sources import find_source
from charrnn.data.stats import ngram_loss
from charrnn.data.tasks import changed_error
from charrnn.data.vocabulary import build_vocabulary, given_vocabulary
from charrnn.data.workers import Workers
from charrnn.errors import CorpusError
from charrnn.io import Advance, expand_user, log, progress_bar, reading
from charrnn.vocab import Ids, Vocab
from charrnn.windows import split_bounds

PARALLEL_BYTES = 32 << 20  # below this, starting workers (0.2 s) takes longer than they save
# Of a cached corpus, this much is checked at the start; training checks every batch.
_CHECKED_PIECES, _CHECKED_IDS = 16, 1 << 20
LEAST_EVALUATED = 2  # one character to predict from, one to predict


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


def prepare(data: DataConfig, *, progress: bool = False) -> Corpus:
    """Return the corpus that `data` names, encoded and memory-mapped; of a machine's processes one prepares it.

    Args:
        data: The configuration.
        progress: Whether to report progress on stderr.

    Raises:
        CorpusError: There is no such corpus, or it cannot be downloaded, read, stored or used.
    """
    given = given_vocabulary(data)
    rules = _rules(data, given)
    source = find_source(data, binary=rules.binary, progress=progress)
    for note in source.notes:
        log(note, progress)
    preparation = _Preparation(data, source, rules, given, progress)
    entry, notes = preparation.find() or preparation.run()
    for note in notes:
        log(note, progress)
    folder = preparation.folder(entry)
    with reading(folder):
        ids = np.memmap(folder / "ids.bin", entry.vocab.dtype.newbyteorder("<"), mode="r")  # (N,)
    for start in range(0, len(ids), max(1, len(ids) // _CHECKED_PIECES)):
        check_ids(ids[start : start + _CHECKED_IDS], len(entry.vocab))
    all_notes = source.notes + notes
    return Corpus(source.name, data.source, entry.vocab, entry.sha256, entry.num_ids, data.split, ids, all_notes)


def find_parts(data: DataConfig) -> Source:
    """Return the parts of the corpus that `data` names. Raises: CorpusError, as `prepare` does."""
    return find_source(data, binary=_rules(data, given_vocabulary(data)).binary)


def _rules(data: DataConfig, given: Vocab | None) -> Rules:
    binary = given is not None and given.kind == "bytes"
    return Rules(binary, data.document_end, data.encoding, data.invalid, data.newlines, data.normalize)


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


class _Preparation:
    """Prepares one corpus, or finds it in the cache."""

    def __init__(self, data: DataConfig, source: Source, rules: Rules, given: Vocab | None, progress: bool) -> None:
        self._data, self._source, self._rules, self._given, self._progress = data, source, rules, given, progress
        self._cache_dir = expand_user(data.cache_dir)
        self._files = [part.path for part in source.parts if part.path]
        self._began_ns = time.time_ns()
        self._stamps = cache.stamps(self._files)
        self._is_large = source.size >= PARALLEL_BYTES
        options = {
            "rules": asdict(rules),
            "vocab": given.to_json() if given else data.vocab,
            "min_count": data.min_count,
            "unknown": data.unknown,
        }
        self._record = cache.record_path(self._cache_dir, self._stamps, options)

    def folder(self, entry: cache.Entry) -> Path:
        """Return where the entry is, or will be."""
        return self._cache_dir / "prepared" / entry.name

    def find(self) -> tuple[cache.Entry, tuple[str, ...]] | None:
        """Return the entry of a large corpus whose files were not touched since it was made, without reading them."""
        if not self._is_large or len(self._files) < len(self._source.parts):
            return None
        known = cache.recall(self._record, self._stamps)
        return known if known and known[0].is_complete(self.folder(known[0])) else None

    def run(self) -> tuple[cache.Entry, tuple[str, ...]]:
        """Return the entry, made if it is not there, and notes; a large corpus is made by one process at a time."""
        if not self._is_large:
            return self._make(lambda _: None)
        with cache.exclusive(self._record, 2 * self._source.size, self._progress) as advance:
            return self.find() or self._make(advance)

    def _make(self, report: Advance) -> tuple[cache.Entry, tuple[str, ...]]:
        data, source, skip = self._data, self._source, self._data.unknown == "skip"
        with Workers(cores() if self._is_large else 0) as workers:
            with self._bar("reading", report) as advance:
                found = scan(source, self._rules, workers, advance, self._given if skip else None)
            vocab, notes = build_vocabulary(data, found, self._given)
            notes = _replaced_note(found) + notes
            entry = cache.Entry(found.sha256, num_ids(found, vocab, skip=skip), vocab, data.unknown)
            table = IdTable.of(vocab, skip=skip)
            _refuse_unusable(data, found, table, entry.num_ids)

            def make(path: Path) -> None:
                with self._bar("encoding", report) as advance:
                    encode(source, self._rules, workers, advance, found, table, path)

            if not entry.is_complete(self.folder(entry)):
                names = [part.name for part in source.parts]
                cache.write(self.folder(entry), entry, make, names, self._progress)
        if cache.stamps(self._files) != self._stamps:
            raise changed_error(source.name)
        if self._is_large and len(self._files) == len(source.parts):
            cache.remember(self._record, self._stamps, self._began_ns, entry, notes)
        return entry, notes

    @contextmanager
    def _bar(self, doing: str, report: Advance) -> Iterator[Advance]:
        with progress_bar(f"{doing} {self._source.name}", self._source.size, self._progress) as advance:

            def both(count: int) -> None:
                advance(count)
                report(count)

            yield both


def _replaced_note(found: Scan) -> tuple[str, ...]:
    if not found.replaced:
        return ()
    return (f"{found.replaced} invalid byte sequence(s) were replaced with U+FFFD, the first at {found.replaced_at}",)


def _refuse_unusable(data: DataConfig, found: Scan, table: IdTable, num_chars: int) -> None:
    if not num_chars:
        raise CorpusError(
            f"the corpus {data.source} has none of the characters of {data.vocab}; use another data.vocab"
        )
    symbols = found.symbols if table.known is None else found.symbols[table.known.take(found.symbols, mode="clip")]
    used = np.unique(table.ids.take(symbols, mode="clip"))
    if len(used) == 1:
        what = f"{num_chars} times the symbol {chr(symbols[0])!r}"
        if len(symbols) > 1:
            what = f"{num_chars} times the replacement of {len(symbols)} characters"
        raise CorpusError(f"the corpus {data.source} is {what} and nothing else; there is nothing to learn from it")
    bounds = split_bounds(num_chars, data.split)
    for (part, (start, stop)), fraction in zip(bounds.items(), data.split, strict=True):
        if part != "train" and fraction > 0 and stop - start < LEAST_EVALUATED:
            what = f"{fraction:g} of {num_chars} characters is {stop - start}"
            remedy = f"evaluation needs {LEAST_EVALUATED}; use a longer text or another data.split"
            raise CorpusError(f"the {part} split of {data.source} is too small: {what}, and {remedy}")
