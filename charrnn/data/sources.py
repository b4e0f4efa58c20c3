"""What `--data` names: a file, folder, glob, address, hf: dataset, standard input, or a published corpus.

A bare word that names a corpus means the corpus; write ./python for a file or folder of that name.
"""

import difflib
import glob
import hashlib
import os
import stat
import sys
from pathlib import Path

from charrnn.config import DataConfig
from charrnn.data import hub
from charrnn.data.collect import Collector
from charrnn.data.named import DATASETS, fetch
from charrnn.data.parts import Source, plain_part
from charrnn.data.readers import BINARY, HIDDEN, stem_of
from charrnn.data.records import DEFAULT_FIELD
from charrnn.data.remote import download_files, is_remote
from charrnn.errors import CorpusError
from charrnn.io import CHUNK_BYTES, expand_user, files_below, is_marked, reading, safe_name, temporary, writing

_INTERNAL = "caches and run folders of charrnn"


def find_source(data: DataConfig, *, binary: bool = False) -> Source:
    """Find the parts of the corpus that `data.source` names; download it if needed.

    Args:
        data: The configuration.
        binary: Whether files are read as bytes, so that those without text count as well.

    Raises:
        CorpusError: There is no such corpus, it cannot be downloaded or read, or an option does not apply to it.
    """
    with reading(Path(data.source)):
        found = _find(data, binary)
    if data.text_field and all(part.documents is None for part in found.parts):
        what = f"data.text_field is {data.text_field!r}, but {data.source} has no records (.jsonl, .parquet, hf:)"
        raise CorpusError(f"{what}; leave it out")
    return found


def _find(data: DataConfig, binary: bool) -> Source:
    source, cache_dir = data.source, expand_user(data.cache_dir)
    if source == "-":
        return _save_stdin(data, binary)
    if is_remote(source):
        name, paths, notes = download_files(source, cache_dir / "downloads")
        if [relative for relative, _ in paths] == [""]:
            return _file(paths[0][1], safe_name(stem_of(Path(name))), data, binary, notes)
        collector = Collector(data, binary=binary)
        for relative, path in paths:
            collector.add(path, relative)
        return collector.source(safe_name(name), Path(source), notes)
    if source.startswith(hub.PREFIX):
        part = hub.hub_part(source, data.text_field or DEFAULT_FIELD)
        return _single(Source(safe_name(hub.dataset_name(source)), (part,)), data)
    if source in DATASETS:
        return _named(data, binary)
    path = expand_user(source)
    if path.is_dir():
        return _folder(path, data, binary)
    if path.exists():
        return _file(path, safe_name(stem_of(path)), data, binary)
    if glob.has_magic(source):
        return _glob(path, data, binary)
    close = difflib.get_close_matches(source.lower(), DATASETS, n=1, cutoff=0.5)
    nearest = f" (nearest: {close[0]})" if close else ""
    raise CorpusError(f"no file, folder or corpus {source!r}{nearest}; the corpora are {', '.join(DATASETS)}")


def _single(source: Source, data: DataConfig) -> Source:
    """Return `source`, which is one file. Raises: CorpusError when files were to be chosen from it."""
    if data.include or data.exclude:
        what = "data.include and data.exclude choose files of a folder, glob, zip archive or the corpus novels"
        raise CorpusError(f"{what}, and {source.name} is none; leave them out")
    return source


def _named(data: DataConfig, binary: bool) -> Source:
    name, cache_dir = data.source, expand_user(data.cache_dir)
    notes: tuple[str, ...] = ()
    if Path(name).exists():
        notes = (f"--data {name} is the corpus of that name; write ./{name} for the file or folder",)
    mirror = data.mirror or os.environ.get("CHARRNN_DATA_MIRROR", "")
    paths = fetch(name, cache_dir, mirror)
    if len(DATASETS[name]) < 2:
        return _single(Source(name, tuple(map(plain_part, paths)), notes), data)
    collector = Collector(data, binary=binary)
    for path in paths:
        collector.add(path, path.name)
    return collector.source(name, cache_dir / name, notes)


def _file(path: Path, name: str, data: DataConfig, binary: bool, notes: tuple[str, ...] = ()) -> Source:
    """Return the text of a file, or those of an archive. name: of the corpus."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorpusError(f"{path} is not a regular file, and a corpus is read twice; pipe it to --data - instead")
    collector = Collector(data, binary=binary)
    candidates = collector.read(path, path.name)
    if [candidate.path for candidate in candidates] != [path.name]:
        return collector.source(name, path, notes)
    [candidate] = candidates
    if candidate.skip_reason not in ("", BINARY):  # NUL bytes may be intended; a PDF is not
        remedy = "save it as plain text, or read its bytes with --set data.vocab=bytes"
        raise CorpusError(f"{path} is not text ({candidate.skip_reason}); {remedy}")
    return _single(Source(name, (candidate.part,), notes), data)


def _glob(pattern: Path, data: DataConfig, binary: bool) -> Source:
    found = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  Path.glob would take hidden files as well
    paths = sorted(map(Path, found), key=Path.as_posix)
    if not any(path.is_file() for path in paths):
        raise CorpusError(f"no file matches {str(pattern)!r}; check the pattern, or name a file or folder")
    root = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    collector = Collector(data, binary=binary, keep_binary=True)
    for path in paths:
        relative = path.relative_to(root)
        if any(is_marked(root / folder) for folder in relative.parents):
            collector.skip(_INTERNAL, relative.as_posix())
        else:
            collector.add(path, relative.as_posix())
    return collector.source(safe_name(root.resolve().name), pattern)


def _folder(root: Path, data: DataConfig, binary: bool) -> Source:
    """Return the texts below `root` without hidden files, links to folders, caches and run folders."""
    if is_marked(root):
        raise CorpusError(f"{root} is a cache or run folder of charrnn; name a file of it, or another folder")
    collector = Collector(data, binary=binary)
    cache = expand_user(data.cache_dir).resolve()

    def enter(folder: Path) -> bool:
        reason = ""
        if folder.name.startswith("."):
            reason = HIDDEN
        elif folder.is_symlink():
            reason = "links to folders"
        elif folder.resolve() == cache:
            reason = "the data folder"
        elif is_marked(folder):
            reason = _INTERNAL
        if reason:
            collector.skip(reason, folder.relative_to(root).as_posix())
        return not reason

    for path in files_below(root, enter):
        relative = path.relative_to(root).as_posix()
        if path.name.startswith("."):
            collector.skip(HIDDEN, relative)
        else:
            collector.add(path, relative)
    return collector.source(safe_name(root.resolve().name), root)


def _save_stdin(data: DataConfig, binary: bool) -> Source:
    """Save standard input to a file, since a corpus is read twice, and again when a run resumes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CorpusError("--data - cannot feed several processes; save the text to a file first and name that")
    if sys.stdin is None or sys.stdin.isatty():
        raise CorpusError("--data - reads standard input, and nothing is piped to it; write: cat FILE | ... --data -")
    digest, cache_dir = hashlib.sha256(), expand_user(data.cache_dir)
    with writing(cache_dir), temporary(cache_dir / "stdin.txt") as path:
        with path.open("wb") as file:
            while chunk := sys.stdin.buffer.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        target = cache_dir / f"stdin-{digest.hexdigest()[:16]}.txt"
        path.replace(target)
    return _file(target, "stdin", data, binary, (f"standard input is saved as {target}",))
