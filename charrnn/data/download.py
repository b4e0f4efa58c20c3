"""Download one file over HTTP: resumed when the server allows it, verified, and renamed into place when complete.

Neither pooch nor fsspec resumes: both discard a partial file and begin again, which on a slow link never ends for a
large one.
"""

import http.client
import re
import string
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from charrnn import __version__
from charrnn.errors import CorpusError
from charrnn.io import find_mismatch, progress_bar, writing

ATTEMPTS = 3
TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 16


class DownloadError(CorpusError):
    """A download failed, or the file is not the expected one."""


def without_credentials(text: str) -> str:
    """Return the text without the user, password and query of an address in it, which may be secret."""
    return re.sub(r"(?s)://(?:[^/?#]*@)?([^?#]*).*", r"://\1", text)


def is_url(text: str) -> bool:
    """Return whether `text` is an http or https address."""
    return text.lower().startswith(("http://", "https://"))


def download(url: str, target: Path, *, size: int = 0, sha256: str = "") -> None:
    """Download `url` to `target`, which appears only when it is complete and verified.

    A partial transfer stays in `target`.part, to be resumed by this call or a later one. Without a checksum only the
    server's tag, kept beside it, tells whether the rest is of the same version.

    Args:
        url: Address.
        target: File.
        size: Expected bytes; 0 = unknown, then the server's Content-Length is checked.
        sha256: Expected hex digest; "" = unknown.

    Raises:
        DownloadError: The server is unreachable, refuses, or sends another file.
        CorpusError: The folder cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    reason = ""
    with writing(target.parent):
        for _ in range(ATTEMPTS):
            if not (sha256 or _tag_file(part).exists()):
                _discard(part)
            offset = part.stat().st_size if part.exists() else 0
            if reason := "" if offset and offset == size else _transfer(url, part, offset, size):
                continue
            if not (reason := find_mismatch(part, size, sha256)):
                part.replace(target)
                _tag_file(part).unlink(missing_ok=True)
                return
            _discard(part)
            if not offset:  # else the bytes that were already there may be at fault: begin again from nothing
                raise DownloadError(f"{url}: {reason}")
    raise DownloadError(
        f"{url}: interrupted {ATTEMPTS} times: {reason}; rerun the same command to resume, if the server allows it"
    )


def _transfer(url: str, part: Path, offset: int, size: int) -> str:
    """Download the bytes of `url` from `offset` on into `part`. Returns: why the transfer is not complete, or ""."""
    headers = {"User-Agent": f"charrnn/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if _tag_file(part).exists():
            headers["If-Range"] = _tag_file(part).read_text(encoding="latin-1")
    quoted = urllib.parse.quote(url, safe=string.punctuation)  # spaces, and letters beyond ASCII
    try:
        response = urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            _discard(part)
            return f"the server has no bytes from {offset} on"
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(f"{url}: {_reason(error)}") from error
    with response:
        return _receive(response, url, part, offset, size)


def _receive(response: http.client.HTTPResponse, url: str, part: Path, offset: int, size: int) -> str:
    """Write the body of a response to `part`, after the `offset` bytes that it may have. Returns: as `_transfer`."""
    start = offset if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
    if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        _discard(part)
        return f"the server sent another range than that from {start} on"
    total = size if response.length is None else start + response.length
    if size and total != size:
        raise DownloadError(f"{url}: size mismatch: expected {size} bytes, got {total}")
    if not start:
        _discard(part)
    _save_tag(response, part)
    with part.open("ab" if start else "wb") as file, progress_bar(part.stem, total, start) as advance:
        while True:
            try:
                chunk = response.read(_CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return _reason(error)
            if not chunk:
                return "" if file.tell() == total or not total else f"received {file.tell()} of {total} bytes"
            file.write(chunk)
            advance(len(chunk))


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _tag_file(part: Path) -> Path:
    """Return the file beside a part with the server's tag of its version."""
    return part.with_name(f"{part.name}.tag")


def _save_tag(response: http.client.HTTPResponse, part: Path) -> None:
    etag = response.headers.get("ETag", "")
    weak = etag.startswith("W/")  # does not identify bytes, so that RFC 9110 forbids it in If-Range
    if tag := response.headers.get("Last-Modified") if weak or not etag else etag:
        _tag_file(part).write_text(tag, encoding="latin-1")
    else:
        _tag_file(part).unlink(missing_ok=True)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
