"""Remote files: http(s) addresses with resumed downloads, and every other scheme that an fsspec driver reads.

Files are copied to the downloads folder once, since preparing reads a corpus twice and a resumed run reads it again.
http(s) is not left to fsspec, whose driver (aiohttp) begins a broken transfer from the start.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from charrnn.data.download import DownloadError, download, is_url
from charrnn.data.readers import COMPRESSED_SUFFIXES, stem_of
from charrnn.data.records import reason_of
from charrnn.errors import CorpusError
from charrnn.io import lock, mark, safe_name, temporary, writing

_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
}

_logger = logging.getLogger(__name__)

Files = list[tuple[str, Path]]


def is_remote(source: str) -> bool:
    """Return whether `source` is an address, as in https://host/novel.txt or s3://bucket/*.txt.gz."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def download_files(source: str, downloads: Path) -> tuple[str, Files, tuple[str, ...]]:
    """Download the files that an address names, unless an earlier call did.

    Args:
        source: Address of a file; except for http(s) also of a folder, or a glob.
        downloads: Where files are kept.

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
            return path.name, *_download_url(source, target.with_name(target.name + _suffix(path)))
        with _driver_errors(source, target):
            return _copy_remote(source, target)


def _suffix(path: PurePosixPath) -> str:
    """Return the suffix, or both where the file is compressed (`.jsonl.gz`), unless they do not look like suffixes."""
    suffixes = path.suffixes[-2:] if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffixes[-1:]
    return "".join(suffix for suffix in suffixes if re.fullmatch(r"\.\w{1,8}", suffix))


def _download_url(url: str, target: Path) -> tuple[Files, tuple[str, ...]]:
    if target.exists():
        return [("", target)], (f"{target} is from an earlier download; delete it to download it again",)
    with lock(target):
        if not target.exists():  # another process may have downloaded it meanwhile
            _logger.info(f"downloading {url}")
            try:
                download(url, target)
            except DownloadError as error:
                raise CorpusError(f"{error}; without a network use --data FILE or --data python") from error
    return [("", target)], ()


def _copy_remote(source: str, folder: Path) -> tuple[str, Files, tuple[str, ...]]:
    """Copy files with fsspec. A file is copied again when the remote one has changed."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(source)
    names = sorted(fs.glob(path) if _is_glob(path) else fs.find(path))
    if not names:
        raise CorpusError(f"no file matches {source!r}; check the address")
    root = path if names != [path] else ""
    while _is_glob(root):
        root = root.rpartition("/")[0]
    files: Files = []
    _logger.info(f"downloading {source}: {len(names)} file(s)")
    with lock(folder):
        for name in names:
            target = folder / fs.ukey(name)[:12] / PurePosixPath(name).name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary(target) as copied:
                    fs.get_file(name, str(copied))
                    copied.replace(target)
            files.append((name.removeprefix(root).lstrip("/") if root else "", target))
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
        remedy = "check the address and your credentials"
        raise CorpusError(f"--data {source} cannot be read: {reason_of(error)}; {remedy}") from error


def _is_glob(path: str) -> bool:
    return not {"*", "?", "["}.isdisjoint(path)
