"""The texts of several files, gathered one by one, and the tale of what was left out."""

from pathlib import Path

from charrnn.data.parts import Part
from charrnn.data.readers import BINARY, Options, Text, look_into
from charrnn.errors import CorpusError, listing


class Gathered:
    """The texts of several files, and what was left out of them."""

    def __init__(self, options: Options, *, named: bool = False) -> None:
        """named: the user's pattern names each file, so that what looks binary is taken too."""
        self._options, self._taken_though = options, ("", BINARY) if named else ("",)
        self._parts: list[Part] = []
        self._left_out: dict[str, list[str]] = {}

    def add(self, path: Path, relative: str) -> None:
        """Takes what is text in the file at `path`, when it is meant."""
        if not path.is_file():
            self.leave_out("not regular files", relative)
        elif self._options.choice.may_take(relative):
            self.look(path, relative)

    def look(self, path: Path, relative: str) -> list[Text]:
        """Takes what is text in the file at `path`. Returns: what is in it."""
        texts = list(look_into(path, relative, self._options))
        for text in texts:
            if text.odd in self._taken_though:
                self._parts.append(text.part)
            else:
                self.leave_out(text.odd, text.relative)
        return texts

    def leave_out(self, why: str, relative: str) -> None:
        """Notes that there was something that is not taken."""
        self._left_out.setdefault(why, []).append(relative)

    def all(self, where: Path) -> tuple[tuple[Part, ...], tuple[str, ...]]:
        """All that was taken of `where`, and a line on what was not. Raises: CorpusError when nothing was taken."""
        choice = self._options.choice
        groups = self._left_out | {"excluded": choice.excluded, "not included": choice.not_included}
        told = [f"{len(paths)} {why} ({listing(paths, 3)})" for why, paths in groups.items() if paths]
        if not self._parts:
            kind = "folder" if where.is_dir() else "archive" if where.exists() else "pattern"
            left_out = f"left out of {where}: {'; '.join(told)}" if told else "it is empty"
            raise CorpusError(f"the {kind} {where} holds no file with text; {left_out}")
        return tuple(self._parts), (f"left out of {where}: {'; '.join(told)}",) if told else ()
