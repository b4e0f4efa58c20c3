"""What `--data` may be, and the parts behind it: a file, folder, glob, URL, hf:, markov:, standard input or a name.

A bare word that is a corpus name means that corpus; write ./python for a file or folder that is called like one.
"""

import difflib
import glob
import hashlib
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from charrnn.data import hub, markov
from charrnn.data.download import DownloadError, download, is_url
from charrnn.data.gathering import Gathered
from charrnn.data.named import DATASETS, fetch
from charrnn.data.parts import Part, plain_part
from charrnn.data.patterns import Choice
from charrnn.data.readers import BINARY, COMPRESSED_SUFFIXES, Options
from charrnn.data.records import DEFAULT_FIELD
from charrnn.errors import CorpusError
from charrnn.io import CHUNK_BYTES, expanded, files_below, is_marked, locked, mark, reading, temporary, writing

_LONGEST_NAME = 60
_OWN = "caches and run folders of charrnn"


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
    source: str,
    cache_dir: Path,
    *,
    mirror: str = "",
    binary: bool = False,
    encoding: str = "auto",
    text_field: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: bool = False,
) -> Source:
    """The parts behind `source`, brought into `cache_dir` where they are not on this machine.

    binary: the files will be read as bytes, so that those without text count as well. encoding: of the texts, as in
    data.encoding. text_field: of records; "" is `text`, and another one also makes records of what begins like JSON
    lines. include, exclude: patterns of files.
    Raises: CorpusError when there is nothing of that name, it cannot be brought or read, or an option has no meaning
    for it.
    """
    options = Options(binary, encoding, text_field, Choice(include, exclude))
    with reading(Path(source)):
        found = _find(source, cache_dir, mirror, options, progress)
    if text_field and all(part.documents is None for part in found.parts):
        raise CorpusError(
            f"data.text_field is {text_field!r}, but {source} has no records (.jsonl, .parquet, hf:); leave it out"
        )
    return found


def _find(source: str, cache_dir: Path, mirror: str, options: Options, progress: bool) -> Source:
    if source == "-":
        return _spool_stdin(cache_dir, options)
    if is_url(source):
        return _download_once(source, cache_dir / "downloads", options, progress)
    if source.startswith(hub.PREFIX):
        part = hub.hub_part(source, options.text_field or DEFAULT_FIELD, progress)
        return _of_one(Source(safe_name(hub.bare_name(source)), (part,)), options)
    if chain := markov.named_source(source):
        name = safe_name(source.replace(":", "-"))
        return _of_one(Source(name, (plain_part(markov.fetch(chain, cache_dir, progress)),)), options)
    if source in DATASETS:
        homonym = [f"--data {source} is the corpus of that name; write ./{source} for the file or folder"]
        notes = tuple(homonym * Path(source).exists())
        paths = fetch(source, cache_dir, mirror, progress)
        if DATASETS[source].files:
            gathered = Gathered(options)
            for path in paths:
                gathered.add(path, path.name)
            parts, left_out = gathered.all(cache_dir / source)
            return Source(source, parts, notes + left_out)
        return _of_one(Source(source, tuple(map(plain_part, paths)), notes), options)
    path = expanded(source)
    if path.is_dir():
        return _folder(path, cache_dir, options)
    if path.exists():
        return _file(path, safe_name(_stem(path)), options)
    if glob.has_magic(source):
        return _glob(path, options)
    raise CorpusError(_unknown_message(source))


def _of_one(source: Source, options: Options) -> Source:
    """Raises: CorpusError when files were to be chosen from what has none to choose from."""
    if options.choice.include or options.choice.exclude:
        what = "data.include and data.exclude choose files of a folder, glob, zip archive or the corpus novels"
        raise CorpusError(f"{what}, and {source.name} is none; leave them out")
    return source


def _unknown_message(source: str) -> str:
    if "://" in source:
        return f"--data {source}: only http and https addresses can be downloaded; bring the file here and name it"
    close = difflib.get_close_matches(source.lower(), DATASETS, n=1, cutoff=0.5)
    nearest = f" (nearest: {close[0]})" if close else ""
    return f"no file, folder or corpus {source!r}{nearest}; the corpora are {', '.join(DATASETS)}"


def safe_name(text: str) -> str:
    """`text` as a name that is short and safe in file names."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:_LONGEST_NAME] or "corpus"


def _stem(path: Path) -> str:
    """A file's name without its suffix, or suffixes where it is compressed."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.stem


def _file(path: Path, name: str, options: Options, notes: tuple[str, ...] = ()) -> Source:
    """The texts of one file, all of an archive's. name: of the corpus."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorpusError(f"{path} is not a regular file, and a corpus is read twice; pipe it to --data - instead")
    gathered = Gathered(options)
    texts = gathered.look(path, path.name)
    if [text.relative for text in texts] != [path.name]:
        parts, left_out = gathered.all(path)
        return Source(name, parts, (*notes, *left_out))
    _of_one(Source(name, ()), options)
    [text] = texts
    if text.odd not in ("", BINARY):  # what has NUL bytes may be meant; a PDF is not
        remedy = "save it as plain text, or read its bytes with --set data.vocab=bytes"
        raise CorpusError(f"{path} is no text ({text.odd}); {remedy}")
    return Source(name, (text.part,), notes)


def _glob(pattern: Path, options: Options) -> Source:
    matches = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  Path.glob would take hidden files as well
    paths = sorted(map(Path, matches), key=Path.as_posix)
    if not any(path.is_file() for path in paths):
        raise CorpusError(f"no file matches {str(pattern)!r}; look at the pattern, or name a file or folder")
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    gathered = Gathered(options, named=True)
    for path in paths:
        relative = path.relative_to(fixed)
        if any(is_marked(fixed / folder) for folder in relative.parents):
            gathered.leave_out(_OWN, relative.as_posix())
        else:
            gathered.add(path, relative.as_posix())
    return Source(safe_name(fixed.resolve().name), *gathered.all(pattern))


def _folder(root: Path, cache_dir: Path, options: Options) -> Source:
    """Every file with text below `root`; hidden ones, links to folders, caches and run folders are left out.

    Raises: CorpusError when `root` is itself a cache or run folder, or holds no text.
    """
    if is_marked(root):
        raise CorpusError(f"{root} is a cache or run folder of charrnn; name a file of it, or another folder")
    gathered = Gathered(options)
    cache = cache_dir.resolve()

    def enter(folder: Path) -> bool:
        why = ""
        if folder.name.startswith("."):
            why = "hidden"
        elif folder.is_symlink():
            why = "links to folders"
        elif folder.resolve() == cache:
            why = "the data folder"
        elif is_marked(folder):
            why = _OWN
        if why:
            gathered.leave_out(why, folder.relative_to(root).as_posix())
        return not why

    for path in files_below(root, enter):
        relative = path.relative_to(root).as_posix()
        if path.name.startswith("."):
            gathered.leave_out("hidden", relative)
        else:
            gathered.add(path, relative)
    return Source(safe_name(root.resolve().name), *gathered.all(root))


def _url_path(url: str) -> Path:
    try:
        return Path(unquote(urlsplit(url).path))
    except ValueError as error:
        raise CorpusError(f"--data {url} is not an address: {error}") from error


def _download_once(url: str, downloads: Path, options: Options, progress: bool) -> Source:
    """The file at `url`, kept under a name of its own, so that the next run needs no network."""
    path = _url_path(url)
    name = safe_name(_stem(path))
    target = downloads / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{_safe_suffix(path)}"
    with writing(downloads):
        mark(downloads)
        if target.exists():
            kept = f"{target} is from an earlier download; delete it to bring it anew"
            return _file(target, name, options, (kept,))
        with locked(target):
            if not target.exists():  # another process may have brought it while this one waited
                try:
                    download(url, target, progress=progress)
                except DownloadError as error:
                    raise CorpusError(f"{error}; without a network use --data FILE or --data python") from error
    return _file(target, name, options)


def _safe_suffix(path: Path) -> str:
    """Its suffix, or both where it is compressed (`.jsonl.gz`), unless they are not like suffixes."""
    suffixes = path.suffixes[-2:] if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffixes[-1:]
    return "".join(suffix for suffix in suffixes if re.fullmatch(r"\.\w{1,8}", suffix))


def _spool_stdin(cache_dir: Path, options: Options) -> Source:
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
    return _file(target, "stdin", options, (f"standard input is kept as {target}",))
