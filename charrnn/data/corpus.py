"""From text to ids on disk: read in pieces on all cores, encoded once, memory-mapped, cut into train, val and test.

Pass one (scanning) finds the alphabet and the checksum, pass two (encoding) writes the ids; neither holds more than a
few MB a core. What was prepared once is found again by the text's checksum, or, when it is large, by its files' stamps.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from charrnn.config import DataConfig
from charrnn.cores import cores
from charrnn.data import cache
from charrnn.data.alphabet import given_vocabulary, vocabulary_of
from charrnn.data.decoding import Rules
from charrnn.data.encode import IdTable, encode, num_ids
from charrnn.data.scanning import PARALLEL_BYTES, Scan, scan
from charrnn.data.segments import changed
from charrnn.data.sources import Source, find_source
from charrnn.data.workers import Workers
from charrnn.errors import CorpusError
from charrnn.io import Advance, byte_bar, expanded, reading, say
from charrnn.turns import Tell, turn
from charrnn.vocab import Ids, Vocab
from charrnn.windows import split_bounds

# Of a prepared corpus that is used again, this much is looked at; training looks at every batch.
_CHECKED_PIECES, _CHECKED_IDS = 16, 1 << 20
LEAST_EVALUATED = 2  # one character to predict from, one to predict


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    name: short and safe in file names. source: as it was given. sha256: of the normalised text's UTF-8 bytes (of the
    raw bytes for a byte vocabulary). num_chars: N, bytes for a byte vocabulary. split: the train, val and test
    shares. ids: (N,) uint8, uint16 or uint32, read-only, on disk. notes: what the user should know, a line each.
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

    def _part(self, name: str) -> Ids:
        return self.ids[slice(*split_bounds(self.num_chars, self.split)[name])]


def prepare(data: DataConfig, *, progress: bool = False) -> Corpus:
    """The corpus that `data` names, encoded and memory-mapped; every rank may call it, one of a machine first.

    progress: tell on stderr what goes on. The environment's CHARRNN_DATA_MIRROR stands in for an empty data.mirror.
    Raises: CorpusError when there is no such corpus, or it cannot be brought, read, stored or used.
    """
    given = given_vocabulary(data)
    rules = _rules(data, given)
    source = find_parts(data, progress=progress)
    for note in source.notes:
        say(note, progress)
    preparation = _Preparation(data, source, rules, given, progress)
    entry, notes = preparation.recalled() or preparation.made()
    for note in notes:
        say(note, progress)
    folder = preparation.folder(entry)
    with reading(folder):
        ids = np.memmap(folder / "ids.bin", entry.vocab.dtype.newbyteorder("<"), mode="r")  # (N,)
    for start in range(0, len(ids), max(1, len(ids) // _CHECKED_PIECES)):
        check_ids(ids[start : start + _CHECKED_IDS], len(entry.vocab))
    all_notes = source.notes + notes
    return Corpus(source.name, data.source, entry.vocab, entry.sha256, entry.num_ids, data.split, ids, all_notes)


def _rules(data: DataConfig, given: Vocab | None) -> Rules:
    binary = given is not None and given.kind == "bytes"
    return Rules(binary, data.document_end, data.encoding, data.invalid, data.newlines, data.normalize)


def find_parts(data: DataConfig, *, progress: bool = False) -> Source:
    """The parts of the corpus that `data` names. Raises: CorpusError, as `prepare` does."""
    return find_source(
        data.source,
        expanded(data.cache_dir),
        mirror=data.mirror or os.environ.get("CHARRNN_DATA_MIRROR", ""),
        binary=_rules(data, given_vocabulary(data)).binary,
        encoding=data.encoding,
        text_field=data.text_field,
        include=data.include,
        exclude=data.exclude,
        progress=progress,
    )


def check_ids(ids: Ids, num_symbols: int, origin: object = None) -> None:
    """Raises: CorpusError when one of `ids` is not below `num_symbols`: the file that they are mapped from was changed.

    origin: the array with all ids of that file, where `ids` is a copy.
    """
    largest = int(ids.max(initial=0))
    if largest >= num_symbols:
        file = getattr(ids if origin is None else origin, "filename", None) or "the prepared corpus"
        raise CorpusError(
            f"{file} is damaged: it has id {largest}, and the vocabulary {num_symbols} symbols; delete its folder, and "
            "run the same command again to prepare the text anew"
        )


class _Preparation:
    """One corpus on its way into the cache."""

    def __init__(self, data: DataConfig, source: Source, rules: Rules, given: Vocab | None, progress: bool) -> None:
        self._data, self._source, self._rules, self._given, self._progress = data, source, rules, given, progress
        self._cache_dir = expanded(data.cache_dir)
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
        """Where the entry is, or will be."""
        return self._cache_dir / "prepared" / entry.name

    def recalled(self) -> tuple[cache.Entry, tuple[str, ...]] | None:
        """The entry of a large corpus whose files were not touched since it was made, without reading them."""
        if not self._is_large or len(self._files) < len(self._source.parts):
            return None
        known = cache.recall(self._record, self._stamps)
        return known if known and known[0].is_whole(self.folder(known[0])) else None

    def made(self) -> tuple[cache.Entry, tuple[str, ...]]:
        """The entry, made where it is not there, and notes; of a large corpus by one process at a time."""
        if not self._is_large:
            return self._make(lambda _: None)
        with turn(self._record, 2 * self._source.size, self._progress) as tell:
            return self.recalled() or self._make(tell)

    def _make(self, tell: Tell) -> tuple[cache.Entry, tuple[str, ...]]:
        data, source, skip = self._data, self._source, self._data.unknown == "skip"
        with Workers(cores() if self._is_large else 0) as workers:
            with self._bar("reading", tell) as advance:
                found = scan(source, self._rules, workers, advance, self._given if skip else None)
            vocab, notes = vocabulary_of(data, found, self._given)
            notes = _note_of_replaced(found) + notes
            entry = cache.Entry(found.sha256, num_ids(found, vocab, skip=skip), vocab, data.unknown)
            table = IdTable.of(vocab, skip=skip)
            _refuse_unusable(data, found, table, entry.num_ids)

            def make(path: Path) -> None:
                with self._bar("encoding", tell) as advance:
                    encode(source, self._rules, workers, advance, found, table, path)

            if not entry.is_whole(self.folder(entry)):
                names = [part.name for part in source.parts]
                cache.write(self.folder(entry), entry, make, names, self._progress)
        if cache.stamps(self._files) != self._stamps:
            raise changed(source.name)
        if self._is_large and len(self._files) == len(source.parts):
            cache.remember(self._record, self._stamps, self._began_ns, entry, notes)
        return entry, notes

    @contextmanager
    def _bar(self, doing: str, tell: Tell) -> Iterator[Advance]:
        with byte_bar(f"{doing} {self._source.name}", self._source.size, self._progress) as advance:

            def both(count: int) -> None:
                advance(count)
                tell(count)

            yield both


def _note_of_replaced(found: Scan) -> tuple[str, ...]:
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
