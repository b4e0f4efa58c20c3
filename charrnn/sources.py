"""What `--data` may be, and the parts behind it: a file, folder, glob, URL, standard input or a corpus name.

A bare word that is a corpus name means that corpus; write ./python for a file or folder that is called like one.
"""

import difflib
import glob
import hashlib
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from charrnn.datasets import DATASETS, fetch
from charrnn.download import DownloadError, download, is_url
from charrnn.errors import CorpusError, listing
from charrnn.parts import Part, plain_part
from charrnn.storage import CHUNK_BYTES, files_below, locked, reading, temporary, writing

_SNIFFED_BYTES = 8192
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Source:
    """The parts that a corpus is joined from, in order.

    name: short and safe in file names. notes: what the user should know, a line each.
    """

    name: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The bytes on disk of all parts."""
        return sum(part.size for part in self.parts)


def find_source(
    source: str, cache_dir: Path, *, mirror: str = "", binary: bool = False, progress: bool = False
) -> Source:
    """The parts behind `source`, brought into `cache_dir` where they are not on this machine.

    binary: the files will be read as bytes, so that those without text count as well.
    Raises: CorpusError when there is nothing of that name, or it cannot be brought.
    """
    if source == "-":
        return _spool_stdin(cache_dir)
    if is_url(source):
        return _download_once(source, cache_dir / "downloads", progress)
    if source in DATASETS:
        homonym = [f"--data {source} is the corpus of that name; write ./{source} for the file or folder"]
        parts = tuple(map(plain_part, fetch(source, cache_dir, mirror, progress)))
        return Source(source, parts, tuple(homonym * Path(source).exists()))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, cache_dir, binary)
    if path.exists():
        return _file(path)
    if glob.has_magic(source):
        return _glob(path)
    raise CorpusError(_unknown_message(source))


def _unknown_message(source: str) -> str:
    if "://" in source:
        return f"--data {source}: only http and https addresses can be downloaded; bring the file here and name it"
    close = difflib.get_close_matches(source.lower(), DATASETS, n=1, cutoff=0.5)
    nearest = f" (nearest: {close[0]})" if close else ""
    return f"no file, folder or corpus {source!r}{nearest}; the corpora are {', '.join(DATASETS)}"


def _safe_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:_LONGEST_NAME] or "corpus"


def _file(path: Path) -> Source:
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorpusError(f"{path} is not a regular file, and a corpus is read twice; pipe it to --data - instead")
    return Source(_safe_name(path.stem), (plain_part(path),))


def _glob(pattern: Path) -> Source:
    matches = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  Path.glob would take hidden files as well
    paths = sorted(map(Path, matches), key=Path.as_posix)
    parts = tuple(plain_part(path) for path in paths if path.is_file())
    if not parts:
        raise CorpusError(f"no file matches {str(pattern)!r}; look at the pattern, or name a file or folder")
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    notes = _left_out(pattern, {"not regular files": [path for path in paths if not path.is_file()]})
    return Source(_safe_name(fixed.resolve().name), parts, notes)


def _folder(root: Path, cache_dir: Path, binary: bool) -> Source:
    """Every file with text below `root`; hidden ones, and the data folder when it lies below, are left out."""
    hidden: list[Path] = []
    own: list[Path] = []
    odd: list[Path] = []
    textless: list[Path] = []
    kept: list[Path] = []
    cache = cache_dir.resolve()

    def enter(folder: Path) -> bool:
        refused = hidden if folder.name.startswith(".") else own if folder.resolve() == cache else None
        if refused is not None:
            refused.append(folder)
        return refused is None

    for path in files_below(root, enter):
        if path.name.startswith("."):
            hidden.append(path)
        elif not path.is_file():
            odd.append(path)
        elif not binary and _is_binary(path):
            textless.append(path)
        else:
            kept.append(path)
    groups = {"hidden": hidden, "the data folder": own, "not regular files": odd, "binary": textless}
    notes = _left_out(root, {why: [path.relative_to(root) for path in paths] for why, paths in groups.items()})
    if not kept:
        raise CorpusError(f"the folder {root} holds no file with text; {'; '.join(notes) or 'it is empty'}")
    return Source(_safe_name(root.resolve().name), tuple(map(plain_part, kept)), notes)


def _is_binary(path: Path) -> bool:
    """Whether a NUL byte stands near the beginning, which no text in UTF-8 has."""
    with reading(path), path.open("rb") as file:
        return b"\0" in file.read(_SNIFFED_BYTES)


def _left_out(where: Path, groups: dict[str, list[Path]]) -> tuple[str, ...]:
    parts = [f"{len(paths)} {why} ({listing([str(p) for p in paths], 3)})" for why, paths in groups.items() if paths]
    return (f"left out of {where}: {'; '.join(parts)}",) if parts else ()


def _url_path(url: str) -> Path:
    try:
        return Path(unquote(urlsplit(url).path))
    except ValueError as error:
        raise CorpusError(f"--data {url} is not an address: {error}") from error


def _download_once(url: str, downloads: Path, progress: bool) -> Source:
    """The file at `url`, kept under a name of its own, so that the next run needs no network."""
    path = _url_path(url)
    name = _safe_name(path.stem)
    target = downloads / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{_safe_suffix(path)}"
    with writing(downloads):
        if target.exists():
            return Source(
                name, (plain_part(target),), (f"{target} is from an earlier download; delete it to bring it anew",)
            )
        with locked(target):
            if not target.exists():  # another process may have brought it while this one waited
                try:
                    download(url, target, progress=progress)
                except DownloadError as error:
                    raise CorpusError(f"{error}; without a network use --data FILE or --data python") from error
    return Source(name, (plain_part(target),))


def _safe_suffix(path: Path) -> str:
    return path.suffix if re.fullmatch(r"\.\w{1,8}", path.suffix) else ""


def _spool_stdin(cache_dir: Path) -> Source:
    """Standard input saved to a file, since a corpus is read twice and a resumed run reads it again."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CorpusError("--data - cannot feed several processes; save the text to a file first and name that")
    if sys.stdin is None or sys.stdin.isatty():
        raise CorpusError("--data - reads standard input, and nothing is piped to it; write: cat FILE | ... --data -")
    digest = hashlib.sha256()
    with writing(cache_dir), temporary(cache_dir / "stdin.txt") as path:
        with path.open("wb") as file:
            while chunk := sys.stdin.buffer.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        target = cache_dir / f"stdin-{digest.hexdigest()[:16]}.txt"
        path.replace(target)
    return Source("stdin", (plain_part(target),), (f"standard input is kept as {target}",))
