"""Downloads: complete and verified or absent; resumed where that is safe."""

import hashlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import names_in
from loopback import Site, serve

from charrnn.data import download as module
from charrnn.data.download import DownloadError, download, is_url
from charrnn.errors import CorpusError

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        site.files["/a.txt"] = CONTENT
        yield site


def downloaded(site: Site, target: Path) -> bytes:
    download(f"{site.url}/a.txt", target, size=len(CONTENT), sha256=DIGEST)
    return target.read_bytes()


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


# What the server does, the partial file and its tag, whether the checksum is known; the byte ranges then requested.
TRANSFERS: dict[str, tuple[dict[str, Any], bytes, str, bool, list[str | None]]] = {
    "complete": ({}, b"", "", True, [None]),
    "interrupted": ({"cuts": [100_000, 50_000]}, b"", "", True, [None, "bytes=100000-", "bytes=150000-"]),
    "without ranges": ({"ranges": False, "cuts": [100_000]}, b"", "", True, [None, "bytes=100000-"]),
    "stale part": ({}, b"x" * 1000, "", True, ["bytes=1000-", None]),
    "stale part of full length": ({}, b"x" * len(CONTENT), "", True, [None]),
    "stale part, too long": ({}, b"x" * (len(CONTENT) + 1), "", True, ["bytes=256001-", None]),
    "complete part": ({}, CONTENT, "", True, []),
    "range elsewhere": ({"shift": 7}, CONTENT[:1000], "", True, ["bytes=1000-", None]),
    "no checksum, no tag": ({"tags": False, "cuts": [1000]}, b"", "", False, [None, None]),
    "no checksum, tag": ({"cuts": [1000]}, b"", "", False, [None, "bytes=1000-"]),
    "part past the end": ({}, CONTENT + b"more", f'"{DIGEST}"', False, ["bytes=256004-", None]),
    "no length": ({"lengths": False}, b"", "", False, [None]),
}


@pytest.mark.parametrize(("server", "part", "tag", "checked", "ranges"), TRANSFERS.values(), ids=TRANSFERS)
def test_transfer_is_resumed_where_safe_and_leaves_only_the_file(
    server: dict[str, Any], part: bytes, tag: str, checked: bool, ranges: list[str | None], site: Site, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "a.txt"
    target.parent.mkdir()
    vars(site).update(server)
    if part:
        part_of(target).write_bytes(part)
    if tag:
        part_of(target).with_name("a.txt.part.tag").write_text(tag)
    expected = {"size": len(CONTENT), "sha256": DIGEST} if checked else {}
    download(f"{site.url}/a.txt", target, **expected)
    assert target.read_bytes() == CONTENT
    assert [wanted for _, wanted in site.asked] == ranges
    assert names_in(target.parent) == ["a.txt"]


def test_later_call_resumes_an_earlier_one(site: Site, tmp_path: Path) -> None:
    site.cuts = [1000] * module.ATTEMPTS
    with pytest.raises(DownloadError, match="interrupted 3 times: received 3000 of 256000 bytes"):
        downloaded(site, tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists()
    assert downloaded(site, tmp_path / "a.txt") == CONTENT
    assert site.asked[-1] == ("/a.txt", "bytes=3000-")


def test_changed_file_is_not_mixed_without_checksum(site: Site, tmp_path: Path) -> None:
    site.cuts = [1000] * module.ATTEMPTS
    with pytest.raises(DownloadError):
        download(f"{site.url}/a.txt", tmp_path / "a.txt")
    site.files["/a.txt"] = CONTENT[::-1]
    download(f"{site.url}/a.txt", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == CONTENT[::-1]


def test_interruption_never_tags_an_old_part_as_new(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    part_of(tmp_path / "a.txt").write_bytes(b"old" * 100)
    (tmp_path / "a.txt.part.tag").write_text('"old"')
    with monkeypatch.context() as patch:
        patch.setattr(module, "progress_bar", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download(f"{site.url}/a.txt", tmp_path / "a.txt")
    download(f"{site.url}/a.txt", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == CONTENT


def test_wrong_content_is_refused_with_both_digests(site: Site, tmp_path: Path) -> None:
    wrong = CONTENT[::-1]
    site.files["/a.txt"] = wrong
    with pytest.raises(DownloadError) as fault:
        downloaded(site, tmp_path / "a.txt")
    assert hashlib.sha256(wrong).hexdigest() in str(fault.value)
    assert DIGEST in str(fault.value)
    assert names_in(tmp_path) == []


def test_a_wrong_size_is_refused_before_the_body_is_read(site: Site, tmp_path: Path) -> None:
    site.files["/a.txt"] = CONTENT + b"!"
    site.cuts = [10]
    with pytest.raises(DownloadError, match="size mismatch: expected 256000 bytes, got 256001"):
        downloaded(site, tmp_path / "a.txt")
    assert len(site.asked) == 1
    assert names_in(tmp_path) == []


def test_a_missing_page_is_named_with_its_status(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"/b.txt: HTTP 404"):
        download(f"{site.url}/b.txt", tmp_path / "b.txt")


@pytest.mark.parametrize("url", ["http://", "http://[1/x", "http://127.0.0.1:99999/x"])
def test_a_malformed_address_is_refused_in_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as fault:
        download(url, tmp_path / "x")
    assert "\n" not in str(fault.value)


def test_blanks_and_letters_beyond_ascii_are_quoted(site: Site, tmp_path: Path) -> None:
    site.files["/a%20%C3%A9.txt"] = b"text"
    download(f"{site.url}/a é.txt", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"text"


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DownloadError, match="timed out"):
        download(f"http://127.0.0.1:{silent.getsockname()[1]}/x", tmp_path / "x")


def test_an_unwritable_folder_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"cannot write to .*/file: (Not a directory|File exists)"):
        downloaded(site, tmp_path / "file" / "a.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX's")
def test_a_disk_that_takes_no_more_is_named(site: Site, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, hard))
    try:
        with pytest.raises(CorpusError, match=f"cannot write to {tmp_path}: File too large; free some space"):
            downloaded(site, tmp_path / "a.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "a.txt").exists()
    assert downloaded(site, tmp_path / "a.txt") == CONTENT


def test_only_web_addresses_are_urls() -> None:
    assert is_url("http://x/y")
    assert is_url("HTTPS://x/y")
    assert not any(map(is_url, ["ftp://x/y", "http", "novel.txt", "s3://x"]))
