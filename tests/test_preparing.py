"""Preparing: ids of any pieces equal those of `Vocab.encode`; the cache of unchanged files; vocabularies."""

import hashlib
import os
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import names_in
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from packed import COMPRESSORS, write_zip

from charrnn.config import DataConfig
from charrnn.data import cache
from charrnn.data import corpus as module
from charrnn.data import encode as passes
from charrnn.data.corpus import Corpus, prepare
from charrnn.data.decode import Replaced, Rules, read_texts
from charrnn.data.encode import IdTable, encode, scan
from charrnn.data.parts import Part
from charrnn.data.vocabulary import RARE
from charrnn.errors import CharRNNError, CorpusError, VocabError
from charrnn.io import release_pages
from charrnn.vocab import Vocab

pytestmark = pytest.mark.usefixtures("here")

CHARACTERS = "ab \r\n\ufeffé\u0301\u0327가\u1100\u1161漢😀\0"
texts = st.lists(st.text(st.sampled_from(CHARACTERS), max_size=40), min_size=1, max_size=3)
rules = st.builds(
    Rules,
    newlines=st.sampled_from(["universal", "keep"]),
    normalize=st.sampled_from(["none", "NFC", "NFD"]),
    document_end=st.sampled_from(["", "|"]),
)


def normalized(texts: list[str], rules: Rules) -> str:
    whole = ""
    for text in texts:
        clean = text.removeprefix("\ufeff")
        if rules.newlines == "universal":
            clean = clean.replace("\r\n", "\n").replace("\r", "\n")
        if rules.normalize != "none":
            clean = unicodedata.normalize(rules.normalize, clean)
        if rules.document_end:
            whole += clean and clean + rules.document_end
        else:
            whole += "\n" * bool(clean and whole and not whole.endswith("\n")) + clean
    return whole


def part_of(raw: bytes, chunk: int) -> Part:
    return Part("novel", None, 0, lambda: iter([raw[i : i + chunk] for i in range(0, len(raw), chunk)]))


@given(
    texts=texts,
    rules=rules,
    codec=st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-32-be", "gb18030"]),
    chunk=st.integers(1, 9),
    least=st.integers(1, 9),
    most=st.integers(1, 9),
)
@example(texts=["abc\r\nb", "\ufeffa"], rules=Rules(), codec="utf-8", chunk=3, least=1, most=1)
@example(texts=["abce\u0301\u0327x"], rules=Rules(normalize="NFC"), codec="utf-8", chunk=1, least=1, most=1)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_do_not_depend_on_the_pieces(
    texts: list[str], rules: Rules, codec: str, chunk: int, least: int, most: int, tmp_path: Path
) -> None:
    assume(codec != "utf-16" or not any(text.startswith("\0") for text in texts))  # which look like UTF-32
    named = "auto" if codec in ("utf-8", "utf-16") else codec
    given = Rules(False, rules.document_end, named, newlines=rules.newlines, normalize=rules.normalize)
    parts = [part_of(text.encode(codec), chunk) for text in texts]
    text = normalized(["\ufeff" + text for text in texts] if codec == "utf-16" else texts, rules)

    def ids_of(vocab: Vocab, *, skip: bool) -> list[int]:
        counted: list[int] = []
        count = encode(
            read_texts(parts, given, Replaced()), IdTable.of(vocab, skip=skip), tmp_path / "ids", counted.append
        )
        ids = np.fromfile(tmp_path / "ids", vocab.dtype).tolist()
        assert count == sum(counted) == len(ids)
        return ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_LEAST_SYMBOLS", least)
        patch.setattr(passes, "_MOST_SYMBOLS", most)
        found = scan(read_texts(parts, given, Replaced()), lambda _: None)
        assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert {chr(s): c for s, c in zip(found.symbols, found.counts, strict=True)} == {c: text.count(c) for c in text}
        if text:
            vocab = Vocab.of_chars(text)
            assert ids_of(vocab, skip=False) == vocab.encode(text).tolist()
        vocab = Vocab.of_chars("ab\n漢")
        assert ids_of(vocab, skip=True) == vocab.encode(text, "skip").tolist()


# ---- memory and space


def test_memory_of_pages_that_were_read_can_be_given_back(tmp_path: Path) -> None:
    np.zeros(8 << 20, np.uint8).tofile(tmp_path / "ids")
    ids = np.memmap(tmp_path / "ids", np.uint8, mode="r")[: 7 << 20]
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[2])  # noqa: E731  pages of files
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    before = resident()
    assert ids.sum() == 0
    full = resident()
    release_pages(ids)
    assert full - before > 1000
    assert resident() - before < 100
    assert ids[-1] == 0
    release_pages(np.zeros(3))


# ---- found again


def prepared(content: str, **fields: Any) -> Corpus:
    Path("novel.txt").write_text(content)
    return prepare(DataConfig(source="novel.txt", **{"split": (0.5, 0.5, 0.0)} | fields))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as written long ago, so that what was prepared from them is recorded."""
    monkeypatch.setattr(cache, "_RACY_NS", -(10**12))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("name", ["novel.txt", "novel.txt.gz"])
def test_files_that_were_not_touched_are_not_read_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(name).write_bytes(COMPRESSORS["gz"](b"one\ntwo\n" * 1000) if name.endswith("gz") else b"one\ntwo\n" * 1000)
    data = DataConfig(source=name, min_count=1001)
    first = prepare(data)
    assert first.notes
    monkeypatch.setattr(module, "scan", None)
    again = prepare(data)
    assert again.ids.tolist() == first.ids.tolist()
    assert (again.sha256, again.vocab, again.notes) == (first.sha256, first.vocab, first.notes)
    with pytest.raises(CorpusError, match=r"the test split of novel.txt.* is too small"):
        prepare(data.model_copy(update={"split": (0.9999, 0.0, 0.0001)}))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("fields", "other"),
    [({"include": ["a.txt"]}, {"include": ["b.txt"]}), ({"text_field": "one"}, {"text_field": "two"})],
    ids=["members", "fields"],
)
def test_a_record_is_of_the_parts_that_were_chosen(fields: dict[str, Any], other: dict[str, Any]) -> None:
    write_zip("books.zip", {"a.txt": "aaab", "b.txt": "bbba"})
    Path("books.jsonl").write_text('{"one": "aaab", "two": "bbba"}')
    name = "books.zip" if "include" in fields else "books.jsonl"
    ids = [prepare(DataConfig(source=name, split=(1, 0, 0), **chosen)).ids.tolist() for chosen in (fields, other)]
    assert ids == [[0, 0, 0, 1], [1, 1, 1, 0]]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("two\none\n" * 1000),
        lambda path: os.utime(path, ns=(0, 0)),
        lambda path: (path.rename("other"), path.write_bytes(Path("other").read_bytes())),
        lambda _: next(Path("data/known").glob("[!.]*.json")).write_text("[]"),
        lambda _: next(Path("data/prepared").glob("*/ids.bin")).write_bytes(b"short"),
    ],
    ids=["content", "times", "inode", "record", "ids"],
)
def test_what_was_touched_or_damaged_is_read_again(change: Any) -> None:
    prepared("one\ntwo\n" * 1000)
    change(Path("novel.txt"))
    text = Path("novel.txt").read_text()
    again = prepare(DataConfig(source="novel.txt"))
    assert again.vocab.decode(again.ids) == text
    assert again.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    "fields",
    [{"newlines": "keep"}, {"normalize": "NFD"}, {"encoding": "latin-1"}, {"min_count": 900}, {"document_end": "|"}],
    ids=str,
)
def test_each_option_that_changes_ids_has_an_entry_of_its_own(fields: dict[str, Any]) -> None:
    Path("novel.txt").write_bytes("é\r\nab\r\n".encode() * 1000 + b"rare")
    plain = prepare(DataConfig(source="novel.txt"))
    other = prepare(DataConfig(source="novel.txt", **fields))
    assert other.ids.tolist() != plain.ids.tolist() or other.vocab != plain.vocab
    assert prepare(DataConfig(source="novel.txt")).ids.tolist() == plain.ids.tolist()
    assert len(names_in("data/prepared")) == 2


def test_a_text_written_just_before_is_not_recorded() -> None:
    prepared("one\ntwo\n" * 1000)
    assert not list(Path("data/known").glob("[!.]*.json"))


def test_stale_temporary_folders_are_removed() -> None:
    corpus = prepared("one\ntwo\n" * 9)
    name = names_in("data/prepared")[0]
    for path in Path("data/prepared", name).iterdir():
        path.unlink()
    Path("data/prepared", name).rmdir()
    for left, age in (("old", 7200), ("new", 60)):
        folder = Path("data/prepared", f".{name}.{left}")
        folder.mkdir()
        (folder / "ids.bin").write_bytes(b"half")
        for path in (folder / "ids.bin", folder):
            os.utime(path, (time.time() - age,) * 2)
    assert prepare(DataConfig(source="novel.txt")).ids.tolist() == corpus.ids.tolist()
    assert names_in("data/prepared") == sorted([name, f".{name}.new"])


@pytest.mark.usefixtures("recorded")
def test_who_waited_finds_the_work_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepared("one\ntwo\n" * 1000)
    [record] = Path("data/known").glob("[!.]*.json")
    record.rename("away")

    @contextmanager
    def wait(target: Path, on_wait: Callable[[], object]) -> Iterator[None]:
        on_wait()
        Path("away").rename(target)  # the other process is done
        yield

    monkeypatch.setattr(module, "lock", wait)
    monkeypatch.setattr(module, "scan", None)
    prepare(DataConfig(source="novel.txt"))
    assert "waiting for another process, which is preparing the same corpus" in capsys.readouterr().err


# ---- vocabularies


def test_rare_characters_are_merged_with_a_note() -> None:
    corpus = prepared("aaaabbbbxyz", min_count=2)
    assert corpus.vocab == Vocab("chars", ("a", "b", RARE), RARE)
    assert corpus.vocab.decode(corpus.ids) == "aaaabbbb" + RARE * 3
    assert corpus.notes == ("data.min_count=2: 3 of 5 characters became U+FFFD, 3 of 11 (0.27 of the text)",)
    assert corpus.vocab.encode("aaaabbbbxyz", "replace").tolist() == corpus.ids.tolist()
    assert prepared("aabb", min_count=2).vocab == Vocab.of_chars("ab")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_vocabulary_file_decides_the_ids(as_json: bool) -> None:
    vocab = Vocab("chars", tuple("cab\n?"), "?") if as_json else Vocab.of_chars("abc\n?")
    Path("vocabulary").write_text(vocab.to_json() if as_json else "abcabc\n?")
    assert prepared("abc\n", vocab="vocabulary").vocab == vocab
    with pytest.raises(
        CorpusError, match=r"2 character\(s\) missing from the vocabulary vocabulary, 3 of 7 .*'x'.*'z'"
    ):
        prepared("abxxz\nb", vocab="vocabulary")
    skipped = prepared("abxxz\nb", vocab="vocabulary", unknown="skip")
    assert skipped.vocab.decode(skipped.ids) == "ab\nb"
    assert (skipped.num_chars, len(skipped.notes)) == (4, 1)
    if as_json:
        replaced = prepared("abxxz\nb", vocab="vocabulary", unknown="replace")
        assert replaced.vocab.decode(replaced.ids) == "ab???\nb"
    else:
        with pytest.raises(VocabError, match=r"no replacement entry for data.unknown=replace"):
            prepared("abxxz\nb", vocab="vocabulary", unknown="replace")


@pytest.mark.parametrize(
    ("vocab", "content", "told"),
    [
        ("byte", None, r"no file 'byte' \(nearest: bytes\)"),
        ("v", b"", "the vocabulary v is empty"),
        ("v", b"\xff", "the vocabulary v is not UTF-8: byte 0"),
        ("v", b'{"kind": "chars"}', "needs at least one symbol"),
    ],
)
def test_a_vocabulary_file_that_is_none_is_refused(vocab: str, content: bytes | None, told: str) -> None:
    if content is not None:
        Path("v").write_bytes(content)
    with pytest.raises(CharRNNError, match=told):
        prepared("abc\n" * 9, vocab=vocab)


def test_replaced_bytes_are_counted_and_placed() -> None:
    Path("novel.txt").write_bytes(b"abc\xff\xfeabc")
    corpus = prepare(DataConfig(source="novel.txt", invalid="replace", split=(0.5, 0.5, 0.0)))
    assert corpus.vocab.decode(corpus.ids) == "abc\ufffd\ufffdabc"
    told = "2 invalid byte sequence(s) were replaced with U+FFFD, the first at byte 3 of novel.txt"
    assert corpus.notes == (told,)
