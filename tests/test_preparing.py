"""Large texts: ids split among workers equal those of `Vocab.encode`; the cache of unchanged files; vocabularies."""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import names_in
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from charrnn import io as storage
from charrnn.config import DataConfig
from charrnn.data import cache, tasks
from charrnn.data import corpus as module
from charrnn.data.corpus import Corpus, prepare
from charrnn.data.encode import IdTable, encode, num_ids
from charrnn.data.parts import Part, Source, plain_part
from charrnn.data.pieces import Rules
from charrnn.data.scan import scan
from charrnn.data.vocabulary import RARE
from charrnn.data.workers import Workers
from charrnn.errors import CharRNNError, CorpusError, VocabError
from charrnn.io import Advance, release_pages
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


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every corpus is large: cut into small tasks, given to two workers, recorded."""
    monkeypatch.setattr(module, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(tasks, "TASK_BYTES", 1000)
    monkeypatch.setattr(tasks, "WINDOW_BYTES", 100)
    monkeypatch.setattr(cache, "_RACY_NS", -(10**12))


def streamed_part(path: Path, chunk_bytes: int) -> Part:
    return Part(path.name, None, path.stat().st_size, partial(_chunks, path, chunk_bytes))


def _chunks(path: Path, size: int, advance: Advance) -> Iterator[bytes]:
    raw = path.read_bytes()
    for start in range(0, len(raw), size):
        advance(len(raw[start : start + size]))
        yield raw[start : start + size]


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


def prepared_ids(parts: list[Part], rules: Rules, folder: Path, workers: Workers) -> tuple[Any, Vocab, list[int]]:
    source = Source("novel", tuple(parts))
    found = scan(source, rules, workers, lambda _: None)
    if not found.num_chars:
        return found, Vocab.of_bytes(), []
    vocab = Vocab.of_chars(map(chr, found.symbols.tolist()))
    encode(source, rules, workers, lambda _: None, found, IdTable.of(vocab, skip=False), folder / "ids.bin")
    return found, vocab, np.fromfile(folder / "ids.bin", vocab.dtype).tolist()


@given(
    texts=texts,
    rules=rules,
    task_bytes=st.integers(4, 30),
    window=st.integers(1, 20),
    chunk=st.integers(0, 9),
    piece=st.integers(1, 9),
)
@example(texts=["abc\r\nb", "\ufeffa"], rules=Rules(), task_bytes=4, window=1, chunk=0, piece=3)
@example(texts=["abce\u0301\u0327x"], rules=Rules(normalize="NFC"), task_bytes=4, window=1, chunk=1, piece=1)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_do_not_depend_on_the_split(
    texts: list[str], rules: Rules, task_bytes: int, window: int, chunk: int, piece: int, tmp_path: Path
) -> None:
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_bytes(text.encode())
    paths = [tmp_path / str(number) for number in range(len(texts))]
    parts = [streamed_part(path, chunk) if chunk else plain_part(path) for path in paths]
    with pytest.MonkeyPatch.context() as patch, Workers(0) as workers:
        patch.setattr(tasks, "TASK_BYTES", task_bytes)
        patch.setattr(tasks, "WINDOW_BYTES", window)
        patch.setattr(tasks, "PIECE_BYTES", piece)
        found, vocab, ids = prepared_ids(parts, rules, tmp_path, workers)
    text = normalized(texts, rules)
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert {chr(s): c for s, c in zip(found.symbols, found.counts, strict=True)} == {c: text.count(c) for c in text}
    assert vocab.decode(ids) == text
    if text:
        assert ids == Vocab.of_chars(text).encode(text).tolist()


@given(texts=texts, codec=st.sampled_from(["utf-16", "utf-32-be", "gb18030"]), task_bytes=st.integers(4, 30))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_large_texts_in_other_encodings_are_the_same(
    texts: list[str], codec: str, task_bytes: int, tmp_path: Path
) -> None:
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_bytes(text.encode(codec))
    assume(codec != "utf-16" or not any(text.startswith("\0") for text in texts))  # which look like UTF-32
    rules = Rules(encoding="auto" if codec == "utf-16" else codec)
    for chunk in (0, 5):
        paths = [tmp_path / str(number) for number in range(len(texts))]
        parts = [streamed_part(path, chunk) if chunk else plain_part(path) for path in paths]
        with pytest.MonkeyPatch.context() as patch, Workers(0) as workers:
            patch.setattr(tasks, "TASK_BYTES", task_bytes)
            _, vocab, ids = prepared_ids(parts, rules, tmp_path, workers)
        marked = ["\ufeff" + text if codec == "utf-16" else text for text in texts]
        assert vocab.decode(ids) == normalized(marked, rules)


def test_workers_equal_one_process(tmp_path: Path) -> None:
    text = "".join(np.random.default_rng(0).choice(list(CHARACTERS + "|"), 30_000))
    (tmp_path / "novel").write_text(text, newline="")
    parts = [plain_part(tmp_path / "novel"), streamed_part(tmp_path / "novel", 777)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TASK_BYTES", 1000)
        patch.setattr(tasks, "WINDOW_BYTES", 100)
        with Workers(0) as none, Workers(2) as two:
            alone, together = (
                prepared_ids(parts, Rules(normalize="NFC"), tmp_path, workers) for workers in (none, two)
            )
    assert len(alone[0].blocks) > 50
    assert alone[1:] == together[1:]
    assert alone[0].sha256 == together[0].sha256
    assert alone[0].blocks == together[0].blocks


def test_first_error_in_the_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "novel").write_bytes(b"a line\n" * 400 + b"\xff" + b"a line\n" * 400 + b"\xfe")
    with pytest.MonkeyPatch.context() as patch, Workers(2) as workers:
        patch.setattr(tasks, "TASK_BYTES", 100)
        with pytest.raises(CorpusError, match=r"novel is not UTF-8 text: byte 0xff at offset 2800;"):
            scan(Source("novel", (plain_part(tmp_path / "novel"),)), Rules(), workers, lambda _: None)


def test_killed_worker_is_an_error() -> None:
    with pytest.raises(CorpusError, match=r"was killed \(exit code 7\); run again"), Workers(1) as workers:
        list(workers.map(os._exit, [7]))


def test_workers_keep_the_order_and_pass_errors_on() -> None:
    with Workers(2) as workers:
        assert list(workers.map(abs, range(-20, 0))) == [(i, -i) for i in range(-20, 0)]
        with pytest.raises(ZeroDivisionError):
            list(workers.map((1).__floordiv__, [1, 2, 0, 4]))


def test_a_script_without_a_guard_may_prepare_a_large_text(here: Path) -> None:
    Path("novel.txt").write_text("a line\n" * 1000)
    Path("script.py").write_text(
        "from charrnn.data import corpus, tasks\n"
        "from charrnn.config import DataConfig\n"
        "corpus.PARALLEL_BYTES, tasks.TASK_BYTES = 1, 1000\n"
        "print(corpus.prepare(DataConfig(source='novel.txt')).num_chars)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, env=environment, cwd=here)
    assert (done.stdout, done.stderr) == ("7000\n", "")


# ---- memory and space


@pytest.mark.parametrize(("raw", "normalize"), [("\u0301".encode() * 1000, "NFC"), (b"\x80" * 2000, "none")])
def test_a_text_that_cannot_be_split_is_refused(
    raw: bytes, normalize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_MAX_WINDOW_BYTES", 64)
    monkeypatch.setattr(tasks, "WINDOW_BYTES", 16)
    monkeypatch.setattr(tasks, "TASK_BYTES", 100)
    (tmp_path / "marks").write_bytes(raw)
    rules = Rules(normalize=normalize, invalid="replace")
    for part in (plain_part(tmp_path / "marks"), streamed_part(tmp_path / "marks", 50)):
        with pytest.raises(CorpusError, match=r"marks has no line end, .* in 64 bytes near"), Workers(0) as workers:
            scan(Source("marks", (part,)), rules, workers, lambda _: None)


def test_too_little_space_is_refused_before_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("novel.txt").write_text("ab" * 1_000_000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_500_000}))
    with pytest.raises(CorpusError, match=r"the ids take 2.0 MB and 1.5 MB are free; .*data.cache_dir=DIR"):
        prepare(DataConfig(source="novel.txt"))
    assert names_in("data/prepared") == []


@pytest.mark.usefixtures("all_large")
def test_full_disk_is_an_error_and_leaves_nothing(
    here: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("novel.txt").write_text("ab\n" * 700_000)
    monkeypatch.setattr(tasks, "TASK_BYTES", 100_000)
    monkeypatch.setattr(cache, "_refuse_full", lambda *_: None)  # as if others filled it meanwhile
    with pytest.raises(CorpusError, match=r"cannot write to .*disk/data/prepared: No space left.*; free some space"):
        prepare(DataConfig(source="novel.txt", cache_dir=str(small_disk / "data")))
    assert names_in(small_disk / "data" / "prepared") == []


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


@pytest.mark.usefixtures("all_large")
def test_a_large_text_that_was_not_touched_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared("one\ntwo\n" * 1000, min_count=1001)
    assert first.notes
    monkeypatch.setattr(module, "scan", None)
    again = prepare(DataConfig(source="novel.txt", min_count=1001, split=(0.5, 0.5, 0.0)))
    assert again.ids.tolist() == first.ids.tolist()
    assert (again.sha256, again.vocab, again.notes) == (first.sha256, first.vocab, first.notes)


@pytest.mark.usefixtures("all_large")
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


@pytest.mark.usefixtures("all_large")
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


@pytest.mark.usefixtures("all_large")
def test_a_text_written_just_before_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_RACY_NS", 2_000_000_000)
    prepared("one\ntwo\n" * 1000)
    assert not list(Path("data/known").glob("[!.]*.json"))


@pytest.mark.usefixtures("all_large")
def test_a_text_that_grows_while_it_is_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan_then_append(*args: Any) -> Any:
        found = scan(*args)
        with Path("novel.txt").open("a") as file:
            file.write("three\n")
        return found

    monkeypatch.setattr(module, "scan", scan_then_append)
    with pytest.raises(CorpusError, match="novel changed while it was read"):
        prepared("one\ntwo\n" * 1000)


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


# ---- one makes, others wait


def _hold(record: str, started: Any, release: Any) -> None:
    with cache.exclusive(Path(record), 200, progress=False) as advance:
        cache._WRITE_S = 0.0
        advance(50)
        started.set()
        release.wait(20)


def test_a_waiting_process_reports_the_holder_and_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "LOG_WAIT_S", 0.05)
    context = multiprocessing.get_context("spawn")
    started, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "it"), started, release))
    holder.start()
    assert started.wait(20)
    monkeypatch.setattr(cache, "log", lambda text, _: (print(text, file=sys.stderr), release.set()))
    with cache.exclusive(tmp_path / "it", 10, progress=True):
        assert release.is_set()
    holder.join()
    lines = set(capsys.readouterr().err.splitlines())
    message = f"process {holder.pid} on {socket.gethostname()}, which is preparing the same corpus: 25% done"
    assert f"waiting for {message}" in lines
    assert names_in(tmp_path) in ([".it.lock"], [])


@pytest.mark.usefixtures("all_large")
def test_who_waited_finds_the_work_done(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared("one\ntwo\n" * 1000)
    find, asked = module._Preparation.find, []

    def at_first_not(self: Any) -> Any:
        asked.append(self)
        return find(self) if len(asked) > 1 else None

    monkeypatch.setattr(module._Preparation, "find", at_first_not)
    monkeypatch.setattr(module, "scan", None)
    prepare(DataConfig(source="novel.txt"))
    assert len(asked) == 2


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


@given(texts=st.lists(st.text("abx\n", max_size=9), min_size=1, max_size=4), task_bytes=st.integers(1, 5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_skipped_characters_get_no_id_at_any_split(texts: list[str], task_bytes: int, tmp_path: Path) -> None:
    for letters in ("ab", "ab\n"):
        vocab = Vocab.of_chars(letters)
        for number, text in enumerate(texts):
            (tmp_path / str(number)).write_text(text)
        source = Source("s", tuple(plain_part(tmp_path / str(number)) for number in range(len(texts))))
        with pytest.MonkeyPatch.context() as patch, Workers(0) as workers:
            patch.setattr(tasks, "TASK_BYTES", task_bytes)
            found = scan(source, Rules(), workers, lambda _: None, vocab)
            table = IdTable.of(vocab, skip=True)
            encode(source, Rules(), workers, lambda _: None, found, table, tmp_path / "ids.bin")
        ids = np.fromfile(tmp_path / "ids.bin", vocab.dtype)
        assert ids.tolist() == vocab.encode(normalized(texts, Rules()), "skip").tolist()
        assert len(ids) == num_ids(found, vocab, skip=True)


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
