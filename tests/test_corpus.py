"""Preparation: exact ids, bounded memory, an atomic cache."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import names_in

from charrnn.config import DataConfig
from charrnn.data import cache, encode, vocabulary
from charrnn.data import corpus as module
from charrnn.data.cache import Entry
from charrnn.data.corpus import Corpus, prepare
from charrnn.data.parts import Source, plain_part, record_part
from charrnn.errors import CorpusError

pytestmark = pytest.mark.usefixtures("here")

VERSE = "Tyger Tyger, burning bright,\nIn the forests of the night;\n"


def prepared(content: str | bytes, **fields: Any) -> Corpus:
    raw = content if isinstance(content, bytes) else content.encode()
    Path("novel.txt").write_bytes(raw)
    return prepare(DataConfig(source="novel.txt", **fields))


def text_of(corpus: Corpus) -> str:
    return corpus.vocab.decode(corpus.ids.tolist())


def entry_of(corpus: Corpus, cache_dir: str = "data") -> Path:
    return Path(cache_dir, "prepared", Entry(corpus.sha256, corpus.num_chars, corpus.vocab).name)


# ---- what comes out


def test_a_corpus_is_its_text_as_ids_of_its_sorted_characters() -> None:
    corpus = prepared(VERSE)
    assert text_of(corpus) == VERSE
    assert corpus.vocab.symbols == tuple(sorted(set(VERSE)))
    assert corpus.sha256 == hashlib.sha256(VERSE.encode()).hexdigest()
    assert (corpus.num_chars, corpus.name, corpus.source) == (len(VERSE), "novel", "novel.txt")
    assert corpus.ids.dtype == np.uint8


def test_splits_are_contiguous_read_only_views_of_one_file() -> None:
    corpus = prepared(VERSE, split=(0.5, 0.25, 0.25))
    n = len(VERSE)
    assert [len(part) for part in (corpus.train, corpus.val, corpus.test)] == [
        n // 2,
        n * 3 // 4 - n // 2,
        n - n * 3 // 4,
    ]
    assert np.concatenate([corpus.train, corpus.val, corpus.test]).tolist() == corpus.ids.tolist()
    for part in (corpus.train, corpus.val, corpus.test):
        assert isinstance(part, np.memmap)
        assert np.shares_memory(part, corpus.ids)
        assert not part.flags.writeable


def test_another_split_uses_the_same_prepared_ids() -> None:
    prepared(VERSE)
    prepared(VERSE, split=(0.5, 0.25, 0.25))
    assert len(names_in("data/prepared")) == 1


def test_more_than_256_characters_are_stored_as_uint16() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) + VERSE
    corpus = prepared(text)
    assert text_of(corpus) == text
    stored = (entry_of(corpus) / "ids.bin").read_bytes()
    assert np.frombuffer(stored, "<u2").tolist() == corpus.vocab.encode(text).tolist()


def test_bytes_encode_any_file_as_it_is() -> None:
    raw = bytes(range(256)) * 3 + b"\xef\xbb\xbf\r\n\xff"
    corpus = prepared(raw, vocab="bytes")
    assert corpus.ids.tobytes() == raw
    assert len(corpus.vocab) == 256
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()


def test_characters_and_bytes_of_one_text_are_kept_apart() -> None:
    assert prepared("é" * 50 + VERSE).num_chars == 50 + len(VERSE)
    assert prepared("é" * 50 + VERSE, vocab="bytes").num_chars == 100 + len(VERSE)
    assert len(names_in("data/prepared")) == 2


def test_a_byte_order_mark_and_foreign_line_ends_are_normalised() -> None:
    corpus = prepared("\ufeffone\r\ntwo\rthree\n\r\n\ufefffour\r")
    assert text_of(corpus) == "one\ntwo\nthree\n\n\ufefffour\n"
    assert corpus.sha256 == prepared("one\ntwo\nthree\n\n\ufefffour\n").sha256


@pytest.mark.parametrize(("codec", "text"), [("utf-16", "漢漢a"), ("cp037", "abc def"), ("gb18030", "漢é")])
def test_checksum_is_of_the_utf8_in_any_encoding(codec: str, text: str) -> None:
    """The first two have as many bytes in the codec as in UTF-8."""
    encoding = "auto" if codec == "utf-16" else codec
    corpus = prepared(text.encode(codec), encoding=encoding, split=(1, 0, 0))
    assert text_of(corpus) == text
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_files_are_joined_in_order_each_on_a_new_line() -> None:
    Path("books").mkdir()
    for name, raw in {
        "1": b"\xef\xbb\xbfone",
        "2": b"two\r\n",
        "3": b"",
        "4": b"\xef\xbb\xbf",
        "5": b"five\r",
        "6": b"six",
    }.items():
        Path("books", name).write_bytes(raw)
    assert text_of(prepare(DataConfig(source="books"))) == "one\ntwo\nfive\nsix"
    assert prepare(DataConfig(source="books", vocab="bytes")).ids.tobytes() == (
        b"\xef\xbb\xbfonetwo\r\n\xef\xbb\xbffive\rsix"
    )


RECORDS = ("one\r\n", "two", "three\rfour")


def prepared_records(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> str:
    """The text of three records after a file."""
    Path("novel.txt").write_text("zero")
    parts = (plain_part(Path("novel.txt")), record_part("records", None, lambda: iter(RECORDS)))
    monkeypatch.setattr(module, "find_source", lambda *_, **__: Source("records", parts))
    return text_of(prepare(DataConfig(source="records", **fields)))


def test_records_are_joined_each_on_a_new_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared_records(monkeypatch) == "zero\none\ntwo\nthree\nfour"
    assert prepared_records(monkeypatch, vocab="bytes") == "zeroone\r\ntwo\nthree\rfour\n"


def test_the_document_end_stands_after_each_file_and_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared_records(monkeypatch, document_end="|") == "zero|one\n|two|three\nfour|"
    assert prepared_records(monkeypatch, vocab="bytes", document_end="|") == "zero|one\r\n|two|three\rfour|"


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
def test_document_end_distinguishes_cache_entries(vocab: Any) -> None:
    marked = prepared(VERSE, vocab=vocab, document_end="\0")
    assert text_of(marked) == VERSE + "\0"
    assert marked.vocab.document_end == "\0"
    plain = prepared(VERSE + "\0", vocab=vocab)
    assert plain.sha256 == marked.sha256
    assert plain.vocab.document_end is None


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
def test_a_text_with_the_document_end_in_it_is_refused(vocab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CorpusError, match=r"novel.txt has the document end .*:.* inside of a text; set data.document_end"
    ):
        prepared("a:b", vocab=vocab, document_end=":")
    with pytest.raises(CorpusError, match=r"records has the document end .*h.* inside"):
        prepared_records(monkeypatch, vocab=vocab, document_end="h")


def test_an_empty_document_has_no_end() -> None:
    Path("books").mkdir()
    for name, text in {"1": "one" * 9, "2": "", "3": "three"}.items():
        Path("books", name).write_text(text)
    assert text_of(prepare(DataConfig(source="books", document_end="\0"))) == "one" * 9 + "\0three\0"


def test_a_large_text_is_prepared_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_LEAST_SYMBOLS", 1 << 16)
    monkeypatch.setattr("charrnn.io.CHUNK_BYTES", 1 << 16)
    text = VERSE * 100_000  # 5.8 MB
    Path("novel.txt").write_text(text)
    tracemalloc.start()
    corpus = prepare(DataConfig(source="novel.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.num_chars == len(text)
    # The histogram of pairs of bytes (0.5 MB) dominates; the text itself must not be there.
    assert peak < 3_000_000 < len(text)


# ---- what is refused


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
@pytest.mark.parametrize(("text", "why"), [("", "is empty"), ("aaaa", "4 times the symbol 'a' and nothing else")])
def test_a_text_from_which_nothing_can_be_learnt_is_refused(text: str, why: str, vocab: str) -> None:
    with pytest.raises(CorpusError, match=f"the corpus novel.txt .*{why}"):
        prepared(text, vocab=vocab)
    assert not Path("data/prepared").exists()


def test_more_symbols_than_a_vocabulary_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    characters = [chr(c) for c in range(0x10000, 0x10000 + 65_537)]
    corpus = prepared("".join(characters))
    assert corpus.ids.dtype == np.uint32
    assert corpus.ids.tolist() == list(range(65_537))
    monkeypatch.setattr(vocabulary, "MAX_SYMBOLS", 65_536)
    with pytest.raises(CorpusError, match=r"65537 different.*holds 65536; .*data.min_count.*--set data.vocab=bytes"):
        prepared("".join(characters))


@pytest.mark.parametrize(("split", "part"), [((0.9, 0.1, 0.0), "val"), ((0.5, 0.45, 0.05), "test")])
def test_a_split_too_small_to_evaluate_is_refused(split: tuple[float, float, float], part: str) -> None:
    with pytest.raises(
        CorpusError, match=rf"the {part} split of novel.txt is too small: {split[1 if part == 'val' else 2]:g} of 10 "
    ):
        prepared("abcdefghij", split=split)
    assert len(prepared("abcdefghij", split=(1.0, 0.0, 0.0)).val) == 0


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("novel.txt").write_text(VERSE)
    gone = Source("novel", (plain_part(Path("novel.txt")),))
    Path("novel.txt").unlink()
    monkeypatch.setattr(module, "find_source", lambda *_, **__: gone)  # as if deleted once it was found
    with pytest.raises(CorpusError, match=r"cannot read novel.txt: No such file"):
        prepare(DataConfig(source="novel.txt"))


def test_a_cache_folder_that_cannot_be_made_is_named() -> None:
    Path("file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"cannot write to file/data/prepared: Not a directory.*data.cache_dir=DIR"):
        prepared(VERSE, cache_dir="file/data")


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX's")
def test_a_full_disk_is_named_and_leaves_nothing_half_made() -> None:
    import resource

    Path("novel.txt").write_text(VERSE * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CorpusError, match="cannot write to data/prepared: File too large; free some space"):
            prepare(DataConfig(source="novel.txt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in("data/prepared") == []


# ---- the cache


def test_a_second_run_finds_what_the_first_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(VERSE)
    monkeypatch.setattr(cache, "write", None)
    assert prepared(VERSE).ids.tolist() == first.ids.tolist()


def test_cached_corpus_works_in_read_only_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(VERSE)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    assert prepare(DataConfig(source="novel.txt")).ids.tolist() == first.ids.tolist()


def test_cache_entry_describes_itself() -> None:
    corpus = prepared(VERSE)
    assert names_in(entry_of(corpus)) == ["ids.bin", "meta.json"]
    meta = json.loads((entry_of(corpus) / "meta.json").read_text())
    assert meta == {
        "format": 2,
        "sha256": corpus.sha256,
        "num_ids": len(VERSE),
        "dtype": "|u1",
        "vocab": corpus.vocab.to_json(),
        "unknown": "error",
    }


def swap_vocabulary(entry: Path) -> None:
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps(meta | {"vocab": "{}"}))


DAMAGE = {
    "truncated": lambda entry: os.truncate(entry / "ids.bin", 5),
    "without meta": lambda entry: (entry / "meta.json").unlink(),
    "garbled meta": lambda entry: (entry / "meta.json").write_text("[1"),
    "other vocabulary": swap_vocabulary,
    "empty": lambda entry: (shutil.rmtree(entry), entry.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(damage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = prepared(VERSE)
    damage(entry_of(corpus))
    again = prepare(DataConfig(source="novel.txt"))
    assert text_of(again) == VERSE
    assert f"{entry_of(corpus)} was damaged and is made again" in capsys.readouterr().err
    assert names_in("data/prepared") == [entry_of(corpus).name]


def test_an_interrupted_preparation_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_sync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(VERSE)
    assert names_in("data/prepared") == []
    assert text_of(prepared(VERSE)) == VERSE


def test_an_entry_that_another_machine_finished_first_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "lock", lambda *_: contextlib.nullcontext())  # as on a disk without file locks
    write_ids = module.encode

    def write_slowly(*args: Any) -> int:
        monkeypatch.setattr(module, "encode", write_ids)
        prepare(DataConfig(source="novel.txt"))  # the other machine, which is done while this one writes
        return write_ids(*args)

    monkeypatch.setattr(module, "encode", write_slowly)
    corpus = prepared(VERSE)
    assert text_of(corpus) == VERSE
    assert names_in("data/prepared") == [entry_of(corpus).name]


def _prepare_in(folder: str) -> list[int]:
    os.chdir(folder)
    return prepare(DataConfig(source="novel.txt")).ids.tolist()


def test_concurrent_preparations_agree(here: Path) -> None:
    Path("novel.txt").write_text(VERSE * 50)
    with ProcessPoolExecutor(4) as pool:
        results = list(pool.map(_prepare_in, [str(here)] * 8))
    assert all(result == results[0] for result in results)
    assert len(results[0]) == len(VERSE) * 50
    assert len(names_in("data/prepared")) == 1


@pytest.mark.parametrize("change", [VERSE.replace("T", "Z"), VERSE[:-1], VERSE.replace("forests", "stsefor")])
def test_a_text_that_changes_while_it_is_read_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = module.scan

    def scan_then_change(*args: Any) -> Any:
        found = scan(*args)
        Path("novel.txt").write_text(change)
        return found

    monkeypatch.setattr(module, "scan", scan_then_change)
    with pytest.raises(CorpusError, match=r"novel(.txt)? changed while it was read"):
        prepared(VERSE)
    assert names_in("data/prepared") == []


# ---- the edge


def test_the_environments_mirror_stands_in_for_an_empty_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(name: str, cache_dir: Path, mirror: str) -> list[Path]:
        asked.append(mirror)
        return [here / "novel.txt"]

    (here / "novel.txt").write_text(VERSE)
    monkeypatch.setattr("charrnn.data.sources.fetch", record)
    monkeypatch.setenv("CHARRNN_DATA_MIRROR", "/from/environment")
    prepare(DataConfig(source="text8"))
    prepare(DataConfig(source="text8", mirror="/from/config"))
    monkeypatch.delenv("CHARRNN_DATA_MIRROR")
    prepare(DataConfig(source="text8"))
    assert asked == ["/from/environment", "/from/config", ""]


def test_skipped_files_are_logged_and_in_the_notes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("books").mkdir()
    Path("books", "a.txt").write_text(VERSE)
    Path("books", ".b.txt").write_text(VERSE)
    told = prepare(DataConfig(source="books"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 hidden (.b.txt)" in err
    assert told.notes == (err.strip(),)
