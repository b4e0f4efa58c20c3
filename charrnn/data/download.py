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
from charrnn.io import find_mismatch, log, progress_bar, writing

ATTEMPTS = 3
TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 16


class DownloadError(CorpusError):
    """A download failed, or the file is not the expected one."""


class _InterruptedTransferError(Exception):
    """The transfer ended early; another attempt may resume it."""


def without_credentials(text: str) -> str:
    """Return the text without the user, password and query of an address in it, which may be secret."""
    return re.sub(r"(?s)://(?:[^/?#]*@)?([^?#]*).*", r"://\1", text)


def is_url(text: str) -> bool:
    """Return whether `text` is an http or https address."""
    return text.lower().startswith(("http://", "https://"))


def download(url: str, target: Path, *, size: int = 0, sha256: str = "", progress: bool = False) -> None:
    """Download `url` to `target`, which appears only when it is complete and verified.

    A partial transfer stays in `target`.part, to be resumed by this call or a later one.

    Args:
        url: Address.
        target: File.
        size: Expected bytes; 0 = unknown, then the server's Content-Length is checked.
        sha256: Expected hex digest; "" = unknown.
        progress: Whether to report progress on stderr.

    Raises:
        DownloadError: The server is unreachable, refuses, or sends another file.
        CorpusError: The folder cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    reason = ""
    log(f"downloading {url}", progress)
    with writing(target.parent):
        for _ in range(ATTEMPTS):
            offset = _resumable_bytes(part, sha256)
            try:
                start = _transfer(url, part, offset, size, progress)
            except _InterruptedTransferError as error:
                reason = str(error)
                continue
            mismatch = find_mismatch(part, size, sha256)
            if not mismatch:
                part.replace(target)
                _tag_file(part).unlink(missing_ok=True)
                return
            _discard(part)
            if not start:  # else the bytes that were already there may be at fault: begin again from nothing
                raise DownloadError(f"{url}: {mismatch}")
    raise DownloadError(
        f"{url}: interrupted {ATTEMPTS} times: {reason}; rerun the same command to resume, if the server allows it"
    )


def _resumable_bytes(part: Path, sha256: str) -> int:
    """Return how much of `part` can be kept.

    Without a checksum only the server's tag tells whether the rest is of the same version.
    """
    if not (sha256 or _tag_file(part).exists()):
        _discard(part)
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, offset: int, size: int, progress: bool) -> int:
    """Download the bytes of `url` from `offset` on into `part`. Returns: the offset from which the server sent."""
    if size and offset == size:
        return offset
    with _open(url, part, offset) as response:
        start = _start_of(response) if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        if start not in (0, offset):
            _discard(part)
            raise _InterruptedTransferError(f"the server sent bytes from {start} on instead of {offset}")
        total = size if response.length is None else start + response.length
        if size and total != size:
            raise DownloadError(f"{url}: size mismatch: expected {size} bytes, got {total}")
        if not start:
            _discard(part)
        _save_tag(response, part)
        received = _copy(response, part, start, total, progress)
    if total and received != total:
        raise _InterruptedTransferError(f"received {received} of {total} bytes")
    return start


def _open(url: str, part: Path, offset: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": f"charrnn/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if _tag_file(part).exists():
            headers["If-Range"] = _tag_file(part).read_text(encoding="latin-1")
    quoted = urllib.parse.quote(url, safe=string.punctuation)  # spaces, and letters beyond ASCII
    try:
        return urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            _discard(part)
            raise _InterruptedTransferError(f"the server has no bytes from {offset} on") from error
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _start_of(response: http.client.HTTPResponse) -> int:
    """Return where a partial response begins, from `Content-Range: bytes START-END/TOTAL`; -1 if it is malformed."""
    span = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(span) if span.isdecimal() else -1


def _copy(response: http.client.HTTPResponse, part: Path, start: int, total: int, progress: bool) -> int:
    """Append the body to the first `start` bytes of `part`. Returns: the bytes that `part` then has."""
    name = part.name.removesuffix(".part")
    with part.open("ab" if start else "wb") as file, progress_bar(name, total, progress, start) as advance:
        while chunk := _read(response):
            file.write(chunk)
            advance(len(chunk))
        return file.tell()


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedTransferError(_reason(error)) from error


def _tag_file(part: Path) -> Path:
    """Return the file beside a part with the server's tag of its version."""
    return part.with_name(f"{part.name}.tag")


def _save_tag(response: http.client.HTTPResponse, part: Path) -> None:
    etag = response.headers.get("ETag", "")
    weak = etag.startswith("W/")  # does not identify bytes, so that RFC 9110 forbids it in If-Range
    tag = response.headers.get("Last-Modified") if weak or not etag else etag
    if tag:
        _tag_file(part).write_text(tag, encoding="latin-1")
    else:
        _tag_file(part).unlink(missing_ok=True)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
