"""Remote files through fsspec, on its memory:// and on a driver that fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from folders import find, names_in
from packed import COMPRESSORS, json_lines

from charrnn.config import DataConfig
from charrnn.data.corpus import prepare
from charrnn.data.remote import is_remote
from charrnn.errors import CorpusError


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    files = fsspec.filesystem("memory")
    files.store.clear()
    for name, content in {
        "/bucket/a.txt.gz": COMPRESSORS["gz"](b"one one\n"),
        "/bucket/sub/b.txt": b"two\n",
        "/bucket/c.jsonl": json_lines({"text": "three"}),
        "/bucket/d.png": b"\x89PNG\0\0",
    }.items():
        files.pipe_file(name, content)
    yield files
    files.store.clear()


def text_of(source: str, **fields: Any) -> str:
    corpus = prepare(DataConfig(source=source, split=(1, 0, 0), **fields))
    return corpus.vocab.decode(corpus.ids.tolist())


@pytest.mark.parametrize(
    ("source", "name", "text"),
    [
        ("memory://bucket/a.txt.gz", "a", "one one\n"),
        ("memory://bucket/*.txt.gz", "bucket", "one one\n"),
        ("memory://bucket/**/*.txt*", "bucket", "one one\ntwo\n"),
        ("memory://bucket", "bucket", "one one\nthree\ntwo\n"),
        ("memory://bucket/", "bucket", "one one\nthree\ntwo\n"),
    ],
)
def test_a_file_folder_or_glob_is_read_as_what_it_is(source: str, name: str, text: str) -> None:
    found = find(source)
    assert found.name == name
    assert text_of(source).rstrip("\n") == text.rstrip("\n")


def test_patterns_choose_and_what_is_skipped_is_reported() -> None:
    assert text_of("memory://bucket", exclude=("sub", "*.jsonl")) == "one one\n"
    assert "1 binary (d.png)" in find("memory://bucket").notes[0]


def test_files_are_copied_once_and_again_when_they_change(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_of("memory://bucket/sub/b.txt") == "two\n"
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "get_file", None)
        assert text_of("memory://bucket/sub/b.txt") == "two\n"
    bucket.pipe_file("/bucket/sub/b.txt", b"new\n")
    assert text_of("memory://bucket/sub/b.txt") == "new\n"


def test_a_missing_file_is_refused() -> None:
    for source in ("memory://bucket/nothing", "memory://bucket/*.md"):
        with pytest.raises(CorpusError, match=r"no file matches 'memory://.*'; check the address"):
            find(source)
    assert not list(Path("data/downloads").rglob("*.txt"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/*.txt", "reading s3:// needs the package s3fs: pip install s3fs"),
        ("gs://bucket/a.txt", "reading gs:// needs the package gcsfs: pip install gcsfs"),
        ("nonsense://a", "reading nonsense:// needs a driver of fsspec .*nonsense"),
        ("file:///etc", "is a path of this machine; name it without the scheme"),
    ],
)
def test_a_missing_driver_is_one_line(source: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message) as refused:
        find(source)
    assert "\n" not in str(refused.value)


def test_a_drivers_error_is_one_line(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(type(bucket), "get_file", refuse)
    with pytest.raises(CorpusError, match="cannot be read: RuntimeError: no credentials; check the address and"):
        find("memory://bucket/sub/b.txt")
    assert not [path for path in Path("data/downloads").rglob("*") if "b.txt" in path.name]


def test_addresses_are_distinguished_from_paths() -> None:
    assert all(map(is_remote, ["s3://a/b", "https://a", "memory://x", "abfs+x://y"]))
    assert not any(map(is_remote, ["a.txt", "C:/a", "c://a", "hf:a/b", "-", "a/b://c"]))
    assert names_in(".") == []
