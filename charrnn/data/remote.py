"""Remote files: http(s) addresses with resumed downloads, and every other scheme that an fsspec driver reads.

Files are copied to the downloads folder once, since preparing reads a corpus twice and a resumed run reads it again.
http(s) is not left to fsspec, whose driver (aiohttp) begins a broken transfer from the start.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from charrnn.data.download import DownloadError, download, is_url
from charrnn.data.readers import COMPRESSED_SUFFIXES, stem_of
from charrnn.errors import CorpusError
from charrnn.io import lock, log, mark, progress_bar, safe_name, temporary, writing

_CHUNK_BYTES = 1 << 20
_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
}

Files = list[tuple[str, Path]]


def is_remote(source: str) -> bool:
    """Return whether `source` is an address, as in https://host/novel.txt or s3://bucket/*.txt.gz."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def download_files(source: str, downloads: Path, progress: bool) -> tuple[str, Files, tuple[str, ...]]:
    """Download the files that an address names, unless an earlier call did.

    Args:
        source: Address of a file; except for http(s) also of a folder, or a glob.
        downloads: Where files are kept.
        progress: Whether to report progress on stderr.

    Returns:
        The file's or folder's name; relative and local path of each file, "" for the relative path of a single file;
        notes for the user.

    Raises:
        CorpusError: The address is malformed, unreachable, or needs a package that is not installed.
    """
    try:
        path = PurePosixPath(unquote(urlsplit(source).path) if is_url(source) else source.split("://", 1)[1])
    except ValueError as error:
        raise CorpusError(f"--data {source} is not an address: {error}") from error
    if source.lower().startswith(("file:", "local:")):
        raise CorpusError(f"--data {source} is a path of this machine; name it without the scheme")
    target = downloads / f"{safe_name(stem_of(path))}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    with writing(downloads):
        mark(downloads)
        if is_url(source):
            target = target.with_name(target.name + _suffix(path))
            return path.name, *_download_url(source, target, progress)
        return _copy_remote(source, target, progress)


def _suffix(path: PurePosixPath) -> str:
    """Return the suffix, or both where the file is compressed (`.jsonl.gz`), unless they do not look like suffixes."""
    suffixes = path.suffixes[-2:] if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffixes[-1:]
    return "".join(suffix for suffix in suffixes if re.fullmatch(r"\.\w{1,8}", suffix))


def _download_url(url: str, target: Path, progress: bool) -> tuple[Files, tuple[str, ...]]:
    if target.exists():
        return [("", target)], (f"{target} is from an earlier download; delete it to download it again",)
    with lock(target):
        if not target.exists():  # another process may have downloaded it meanwhile
            try:
                download(url, target, progress=progress)
            except DownloadError as error:
                raise CorpusError(f"{error}; without a network use --data FILE or --data python") from error
    return [("", target)], ()


def _copy_remote(source: str, folder: Path, progress: bool) -> tuple[str, Files, tuple[str, ...]]:
    """Copy files with fsspec. A file is copied again when the remote one has changed."""
    with _driver_errors(source, folder):
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(source)
        names = sorted(fs.glob(path) if _is_glob(path) else fs.find(path))
        if not names:
            raise CorpusError(f"no file matches {source!r}; check the address")
        root = path if names != [path] else ""
        while _is_glob(root):
            root = root.rpartition("/")[0]
        files: Files = []
        sizes = [int(fs.info(name)["size"] or 0) for name in names]
        log(f"downloading {source}: {len(names)} file(s), {sum(sizes) / 1e6:.1f} MB", progress)
        with lock(folder), progress_bar(f"downloading {source}", sum(sizes), progress) as advance:
            for name, size in zip(names, sizes, strict=True):
                target = folder / fs.ukey(name)[:12] / PurePosixPath(name).name
                if not target.exists():
                    _copy(fs, name, target)
                files.append((name.removeprefix(root).lstrip("/") if root else "", target))
                advance(size)
    return PurePosixPath(root or names[0]).name, files, ()


@contextmanager
def _driver_errors(source: str, folder: Path) -> Iterator[None]:
    """Convert the errors of fsspec and of its drivers to CorpusError; those of the local `folder` pass."""
    try:
        yield
    except CorpusError:
        raise
    except (ImportError, ValueError) as error:  # no driver, or no such scheme
        scheme = source.split("://")[0].lower()
        driver = _DRIVERS.get(scheme)
        needed = f"the package {driver}: pip install {driver}" if driver else f"a driver of fsspec ({error})"
        raise CorpusError(f"--data {source}: reading {scheme}:// needs {needed}") from error
    except Exception as error:  # each driver raises its library's errors
        if isinstance(error, OSError) and str(error.filename).startswith(str(folder)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        remedy = "check the address and your credentials"
        raise CorpusError(f"--data {source} cannot be read: {reason}; {remedy}") from error


def _is_glob(path: str) -> bool:
    return not {"*", "?", "["}.isdisjoint(path)


def _copy(fs: Any, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary(target) as path:
        with fs.open(name, "rb") as source, path.open("wb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                file.write(chunk)
        path.replace(target)
