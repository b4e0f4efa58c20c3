"""The texts of several files, chosen by include and exclude patterns, and the report of what was skipped."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from charrnn.config import DataConfig
from charrnn.data.parts import Part, Source
from charrnn.data.readers import BINARY, Candidate, read_file
from charrnn.errors import CorpusError, listing


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern matches the file at `path`, or one of its folders.

    `*` and `?` stand for characters of one name, `[...]` for one of a set, `**` for any number of folders. A pattern
    without a slash matches names at any depth, as in .gitignore files. Case counts.

    Raises:
        CorpusError: The pattern is empty.
    """
    names = pattern.replace("\\", "/").removeprefix("./").strip("/").split("/")
    if names == [""]:
        raise CorpusError(
            f"the pattern {pattern!r} of data.include or data.exclude is empty; write for example '*.txt'"
        )
    return _match(path.split("/"), names if len(names) > 1 else ["**", *names])


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return True  # the names that are left are below a folder that matched
    if patterns[0] == "**":
        if len(patterns) == 1:
            return bool(names)
        return any(_match(names[skipped:], patterns[1:]) for skipped in range(len(names)))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _match(names[1:], patterns[1:])


class Collector:
    """Collects the parts of a corpus file by file."""

    def __init__(self, data: DataConfig, *, binary: bool, keep_binary: bool = False) -> None:
        """Create an empty collection.

        Args:
            data: Patterns, encoding and field of records.
            binary: Whether files are read as bytes, so that those without text count as well.
            keep_binary: Whether to take files that look binary, since the user's pattern names each of them.
        """
        self._data, self._binary = data, binary
        self._accepted = ("", BINARY) if keep_binary else ("",)
        self._parts: list[Part] = []
        self._skipped: dict[str, list[str]] = {}

    def add(self, path: Path, relative: str) -> None:
        """Take the texts in the file at `path`, if the patterns select its relative path."""
        if not path.is_file():
            self.skip("not regular files", relative)
        elif self._selects(relative, may_be_archive=relative.lower().endswith(".zip")):
            self.read(path, relative)

    def read(self, path: Path, relative: str) -> list[Candidate]:
        """Take the texts in the file at `path`. Returns: all that is in it."""
        found = list(read_file(path, relative, self._data, binary=self._binary, select=self._selects))
        for candidate in found:
            if candidate.skip_reason in self._accepted:
                self._parts.append(candidate.part)
            else:
                self.skip(candidate.skip_reason, candidate.path)
        return found

    def skip(self, reason: str, relative: str) -> None:
        """Record that a file or folder is not taken."""
        self._skipped.setdefault(reason, []).append(relative)

    def source(self, name: str, origin: Path, notes: tuple[str, ...] = ()) -> Source:
        """Return the parts as a corpus, with a note on what was skipped in `origin`.

        Raises:
            CorpusError: There is no part.
        """
        skipped = "; ".join(f"{len(paths)} {reason} ({listing(paths, 3)})" for reason, paths in self._skipped.items())
        if not self._parts:
            kind = "folder" if origin.is_dir() else "archive" if origin.exists() else "pattern"
            reason = f"skipped in {origin}: {skipped}" if skipped else "it is empty"
            raise CorpusError(f"the {kind} {origin} holds no text file; {reason}")
        return Source(name, tuple(self._parts), (*notes, *([f"skipped in {origin}: {skipped}"] if skipped else ())))

    def _selects(self, relative: str, may_be_archive: bool = False) -> bool:
        """Return whether the patterns select a file; an archive is left to its members unless it is excluded."""
        if any(matches(relative, pattern) for pattern in self._data.exclude):
            self.skip("excluded", relative)
            return False
        include = self._data.include
        if may_be_archive or not include or any(matches(relative, pattern) for pattern in include):
            return True
        self.skip("not included", relative)
        return False
