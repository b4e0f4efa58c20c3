"""Which files of a folder, glob or archive are meant: include and exclude patterns over relative paths."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from charrnn.errors import CorpusError


@dataclass
class Choice:
    """The patterns, and what they left out.

    include: what is taken; none = everything. exclude: what of that is left out. not_included, excluded: the paths that
    `takes` refused, in the order in which it was asked.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    not_included: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    def may_take(self, path: str) -> bool:
        """`takes`, but for an archive, whose members are asked for one by one; it is refused only where excluded."""
        if path.lower().endswith(".zip") and not any(matches(path, pattern) for pattern in self.exclude):
            return True
        return self.takes(path)

    def takes(self, path: str) -> bool:
        """Whether the file at the relative `path`, with / between its folders, is meant."""
        if any(matches(path, pattern) for pattern in self.exclude):
            self.excluded.append(path)
            return False
        if self.include and not any(matches(path, pattern) for pattern in self.include):
            self.not_included.append(path)
            return False
        return True


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern means the file at `path`, or one of the folders above it.

    `*` and `?` stand for characters of one name, `[...]` for one of some, `**` for any number of folders. A pattern
    without a / means names at any depth, as in .gitignore files; capitals count.
    """
    return _compiled(pattern).fullmatch(path) is not None


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Raises: CorpusError for a pattern that can match nothing."""
    names = pattern.replace("\\", "/").removeprefix("./").strip("/").split("/")
    if names == [""]:
        raise CorpusError(
            f"the pattern {pattern!r} of data.include or data.exclude is empty; write for example '*.txt'"
        )
    if len(names) == 1:
        names = ["**", *names]
    ahead = "".join("(?:[^/]+/)*" if name == "**" else f"{_translated(name)}/" for name in names[:-1])
    last = ".+" if names[-1] == "**" else f"{_translated(names[-1])}(?:/.*)?"
    return re.compile(f"{ahead}{last}", re.DOTALL)


def _translated(name: str) -> str:
    """One name of a pattern as a regular expression."""
    out, rest = "", name
    while rest:
        group = re.match(r"\[(!?)(\]?[^\]]*)\]", rest)
        if rest[0] == "*":
            out, rest = out + "[^/]*", rest.lstrip("*")
        elif rest[0] == "?":
            out, rest = out + "[^/]", rest[1:]
        elif group and group[2]:
            members = re.sub(r"([\\\[\]^&~|])", r"\\\1", group[2])
            out, rest = out + (f"[^/{members}]" if group[1] else f"[{members}]"), rest[group.end() :]
        else:
            out, rest = out + re.escape(rest[0]), rest[1:]
    return out
