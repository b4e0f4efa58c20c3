"""One file over HTTP: resumed when the server can, restarted when not, checked, and in place only when whole."""

import http.client
import re
import string
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from charrnn import __version__
from charrnn.errors import CorpusError
from charrnn.io import byte_bar, fault_of, say, writing

ATTEMPTS = 3
TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 16


class DownloadError(CorpusError):
    """A file cannot be brought, or is not the one that was meant."""


class _BrokenOffError(Exception):
    """The transfer ended early; another attempt may go on from what came."""


def without_credentials(text: str) -> str:
    """The text with the user, password and query of an address in it left out: they may be secret."""
    return re.sub(r"(?s)://(?:[^/?#]*@)?([^?#]*).*", r"://\1", text)


def is_url(text: str) -> bool:
    """Whether `text` is an http or https address."""
    return text.lower().startswith(("http://", "https://"))


def download(url: str, target: Path, *, size: int = 0, sha256: str = "", progress: bool = False) -> None:
    """Brings `url` to `target`, which appears only when it is whole and checked.

    What a broken transfer left in `target`.part is resumed, by this call or a later one. size: bytes the file must
    have, 0 = unknown, then the server's Content-Length is checked. sha256: digest it must have, "" = unknown.
    Raises: DownloadError when the server cannot be reached, refuses, or sends another file; CorpusError when the
    folder cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    broken = ""
    say(f"downloading {url}", progress)
    with writing(target.parent):
        for _ in range(ATTEMPTS):
            offset = _resumable_bytes(part, sha256)
            try:
                start = _transfer(url, part, offset, size, progress)
            except _BrokenOffError as error:
                broken = str(error)
                continue
            fault = fault_of(part, size, sha256)
            if not fault:
                part.replace(target)
                _tag_file(part).unlink(missing_ok=True)
                return
            _discard(part)
            if not start:  # else what was already there may be to blame: begin again from nothing
                raise DownloadError(f"{url}: {fault}")
    raise DownloadError(
        f"{url} broke off {ATTEMPTS} times: {broken}; the same command goes on from there if the server can"
    )


def _resumable_bytes(part: Path, sha256: str) -> int:
    """How much of `part` can be kept.

    Without a checksum at the end, only a server that still has the version we began with may add to it: a part of
    which no version is known is thrown away.
    """
    if not (sha256 or _tag_file(part).exists()):
        _discard(part)
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, offset: int, size: int, progress: bool) -> int:
    """Brings the bytes of `url` from `offset` on into `part`. Returns: the position from which the server sent."""
    if size and offset == size:
        return offset
    with _open(url, part, offset) as response:
        start = _start_of(response) if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        if start not in (0, offset):
            _discard(part)
            raise _BrokenOffError(f"asked to go on from byte {offset}, the server went on from {start}")
        total = size if response.length is None else start + response.length
        if size and total != size:
            raise DownloadError(f"{url}: size mismatch: expected {size} bytes, got {total}")
        if not start:
            _discard(part)
        _save_tag(response, part)
        received = _copy(response, part, start, total, progress)
    if total and received != total:
        raise _BrokenOffError(f"{received} of {total} bytes came")
    return start


def _open(url: str, part: Path, offset: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": f"charrnn/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if _tag_file(part).exists():
            headers["If-Range"] = _tag_file(part).read_text(encoding="latin-1")
    try:
        return urllib.request.urlopen(urllib.request.Request(_quoted(url), headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            _discard(part)
            raise _BrokenOffError(f"the server has nothing from byte {offset} on") from error
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(f"{url}: {_reason(error)}") from error


def _quoted(url: str) -> str:
    """`url` with spaces and letters beyond ASCII percent-encoded, the rest as it is."""
    return urllib.parse.quote(url, safe=string.punctuation)


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _start_of(response: http.client.HTTPResponse) -> int:
    """Where a partial answer begins, from `Content-Range: bytes START-END/TOTAL`; -1 when that cannot be read."""
    span = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(span) if span.isdecimal() else -1


def _copy(response: http.client.HTTPResponse, part: Path, start: int, total: int, progress: bool) -> int:
    """Appends the answer's body to the first `start` bytes of `part`. Returns: the bytes that `part` then has."""
    name = part.name.removesuffix(".part")
    with part.open("ab" if start else "wb") as file, byte_bar(name, total, progress, start) as advance:
        while chunk := _read(response):
            file.write(chunk)
            advance(len(chunk))
        return file.tell()


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(_reason(error)) from error


def _tag_file(part: Path) -> Path:
    """Beside a part: the server's name for the version it is of."""
    return part.with_name(f"{part.name}.tag")


def _save_tag(response: http.client.HTTPResponse, part: Path) -> None:
    etag = response.headers.get("ETag", "")
    weak = etag.startswith("W/")  # says nothing about single bytes, so that RFC 9110 forbids it in If-Range
    tag = response.headers.get("Last-Modified") if weak or not etag else etag
    if tag:
        _tag_file(part).write_text(tag, encoding="latin-1")
    else:
        _tag_file(part).unlink(missing_ok=True)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
