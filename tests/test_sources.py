"""The files that --data names, and their order."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import find, names_in
from loopback import Site, closed_port

from charrnn.data.named import DATASETS
from charrnn.data.parts import Source
from charrnn.errors import CorpusError
from charrnn.io import safe_name

pytestmark = pytest.mark.usefixtures("here")


def write(*names: str, content: bytes = b"text\n") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def names(source: Source) -> list[str]:
    return [part.path.as_posix() for part in source.parts]


def piped(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content))


# ---- files, folders, globs


@pytest.mark.parametrize(("path", "name"), [("my novel (2).txt", "my-novel-2"), ("deep/é.md", "é"), ("...", "corpus")])
def test_a_file_is_named_by_its_stem_made_safe(path: str, name: str) -> None:
    write(path)
    found = find(path)
    assert (found.name, names(found), found.size) == (name, [path], 5)


def test_folder_is_its_files_sorted_by_relative_path() -> None:
    write("books/b.txt", "books/a/z.md", "books/a.txt", "books/c/d/e")
    found = find("books/")
    assert names(found) == ["books/a.txt", "books/a/z.md", "books/b.txt", "books/c/d/e"]
    assert found.name == "books"
    assert found.notes == ()


def test_folder_skips_and_reports_hidden_and_binary_files() -> None:
    write("books/a.txt", "books/.git/config", "books/.b.txt", "books/sub/.c")
    write("books/d.png", content=b"\x89PNG\0\0")
    Path("books/gone.txt").symlink_to("nowhere")
    found = find("books")
    assert names(found) == ["books/a.txt"]
    [note] = found.notes
    assert "3 hidden (.git, .b.txt, sub/.c)" in note
    assert "1 binary (d.png)" in note
    assert "1 not regular files (gone.txt)" in note


def test_bytes_take_the_binary_files_of_a_folder_too() -> None:
    write("books/a.txt")
    write("books/d.png", content=b"\x89PNG\0\0")
    assert names(find("books", binary=True)) == ["books/a.txt", "books/d.png"]


def test_folder_excludes_the_data_folder_in_it() -> None:
    write("a.txt", "data/prepared/x/ids.txt")
    found = find(".")
    assert names(found) == ["a.txt"]
    assert "1 the data folder (data)" in found.notes[0]
    write("data/mine/b.txt")
    assert names(find("data/mine")) == ["data/mine/b.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("books/*.txt", ["books/a.txt", "books/b.txt"]),
        ("books/[b-c].*", ["books/b.txt", "books/c.md"]),
        ("books/**/*.txt", ["books/a.txt", "books/b.txt", "books/sub/d.txt"]),
    ],
)
def test_glob_is_its_files_sorted(pattern: str, expected: list[str]) -> None:
    write("books/b.txt", "books/a.txt", "books/c.md", "books/sub/d.txt", "books/.hidden.txt")
    found = find(pattern)
    assert names(found) == expected
    assert found.name == "books"


def test_folder_matched_by_a_glob_is_skipped() -> None:
    write("books/a.txt", "books/sub/b.txt")
    found = find("books/*")
    assert names(found) == ["books/a.txt"]
    assert "skipped in books/*: 1 not regular files (sub)" in found.notes[0]


def test_a_file_whose_name_looks_like_a_glob_is_that_file() -> None:
    write("a[1].txt", "a1.txt")
    assert names(find("a[1].txt")) == ["a[1].txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes in folders are POSIX's")
def test_a_named_pipe_is_refused_since_it_can_be_read_once() -> None:
    os.mkfifo("pipe")
    with pytest.raises(CorpusError, match=r"pipe is not a regular file.*--data - instead"):
        find("pipe")


def test_the_home_folder_may_be_written_as_a_tilde(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    write("novel.txt")
    assert names(find("~/novel.txt")) == [(here / "novel.txt").as_posix()]


# ---- names


def test_a_bare_corpus_name_means_the_corpus_and_a_path_the_file() -> None:
    write("python")
    named = find("python")
    assert named.name == "python"
    assert len(named.parts) > 100
    assert "write ./python for the file" in named.notes[0]
    assert names(find("./python")) == ["python"]


def test_no_corpus_name_could_be_taken_for_a_path() -> None:
    assert not any(set(name) & set("./\\*?[:") for name in DATASETS)


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("shakespear", "shakespeare"), ("Text8", "text8"), ("pyhton", "python")]
)
def test_an_unknown_source_lists_the_names_and_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(CorpusError) as fault:
        find(wrong)
    assert f"(nearest: {nearest})" in str(fault.value)
    assert ", ".join(DATASETS) in str(fault.value)


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        ("empty", [], "the folder empty holds no text file; it is empty"),
        ("books", ["books/.a"], "the folder books holds no text file; skipped in books: 1 hidden"),
        ("books/*.txt", ["books/.a"], r"no file matches 'books/\*\.txt'"),
        ("/no/such/file", [], "no file, folder or corpus '/no/such/file'; the corpora are"),
        ("http://[1/x", [], r"--data http://\[1/x is not an address"),
    ],
)
def test_what_holds_no_text_is_refused(source: str, files: list[str], message: str) -> None:
    Path("empty").mkdir()
    write(*files)
    with pytest.raises(CorpusError, match=message):
        find(source)


# ---- addresses


def test_url_is_downloaded_once_to_a_file_of_its_own(site: Site) -> None:
    site.files["/books/My%20Novel.txt?version=2"] = b"text"
    url = f"{site.url}/books/My%20Novel.txt?version=2"
    first, second = find(url), find(url)
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    assert names(first) == names(second) == [f"data/downloads/My-Novel-{digest}.txt"]
    assert first.parts[0].path.read_bytes() == b"text"
    assert first.name == second.name == "My-Novel"
    assert len(site.asked) == 1
    assert "from an earlier download; delete it" in second.notes[0]


def test_two_addresses_with_one_file_name_do_not_meet(site: Site) -> None:
    site.files |= {"/a/x.txt": b"a", "/b/x.txt": b"b"}
    assert [find(f"{site.url}/{folder}/x.txt").parts[0].path.read_bytes() for folder in "ab"] == [b"a", b"b"]


def test_failed_download_names_what_works_offline() -> None:
    with closed_port() as url, pytest.raises(CorpusError, match=r"refused; without a network use --data FILE or"):
        find(f"{url}/x.txt")


# ---- standard input


def test_standard_input_is_kept_under_its_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"piped \xff text" * 100_000
    monkeypatch.setattr(sys, "stdin", piped(content))
    found = find("-")
    assert found.name == "stdin"
    assert names(found) == [f"data/stdin-{hashlib.sha256(content).hexdigest()[:16]}.txt"]
    assert found.parts[0].path.read_bytes() == content
    assert len(names_in("data")) == 1


def test_a_terminal_as_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin in (Terminal(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(CorpusError, match="nothing is piped to it"):
            find("-")


def test_standard_input_is_refused_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", piped(b"text"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CorpusError, match="save the text to a file first"):
        find("-")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find("-").name == "stdin"


# ---- weight


def test_finding_and_preparing_a_corpus_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import charrnn.data.corpus"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_names_are_short_enough_for_a_file_name() -> None:
    assert len(safe_name("x" * 300)) <= 60
