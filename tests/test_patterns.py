"""Include and exclude patterns over relative paths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charrnn.data.collect import matches
from charrnn.errors import CorpusError


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.txt", ["a.txt", "x/a.txt", "x/y/.txt"], ["a.txt.gz", "atxt", "a.TXT"]),
        ("node_modules", ["node_modules/x.js", "a/node_modules/b/c", "node_modules"], ["node_modules2/x"]),
        ("docs/*.md", ["docs/a.md"], ["docs/x/a.md", "x/docs/a.md"]),
        ("docs/**/*.md", ["docs/a.md", "docs/x/a.md", "docs/x/y/a.md"], ["x/docs/a.md", "docs/a.txt"]),
        ("docs/**", ["docs/a", "docs/x/y"], ["docs", "docs2/a"]),
        ("**/test_*.py", ["test_a.py", "x/y/test_b.py"], ["xtest_a.py"]),
        ("docs/", ["docs/a", "docs/x/y", "x/docs/a"], ["docs2"]),
        ("./docs/a?.md", ["docs/ab.md"], ["docs/a.md", "docs/a/.md"]),
        ("[a-c][!0-9].txt", ["bx.txt", "x/a-.txt"], ["b5.txt", "dx.txt"]),
        ("[]x].txt", ["].txt", "x.txt"], ["y.txt"]),
        ("a[.txt", ["a[.txt"], ["a.txt"]),
        ("a.b+(c)|d", ["a.b+(c)|d"], ["axb+(c)|d", "d"]),
        ("x\\*.txt", ["x/a.txt"], ["x/y/a.txt"]),
        ("books.zip/**/*.txt", ["books.zip/a.txt", "books.zip/x/a.txt"], ["a.txt"]),
    ],
)
def test_a_pattern_means_these_and_not_those(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [path for path in yes if not matches(path, pattern)] == []
    assert [path for path in no if matches(path, pattern)] == []


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/*?[\\"), min_size=1), min_size=2, max_size=4))
def test_a_plain_path_matches_itself_alone(names: list[str]) -> None:
    path = "/".join(names)
    if names[0] != "." and path.strip("/") == path:
        assert matches(path, path)
        assert not matches(f"x{path}", path)


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_any_pattern_is_one_or_is_refused(pattern: str, path: str) -> None:
    try:
        matches(path, pattern)
    except CorpusError:
        assert not pattern.replace("\\", "/").removeprefix("./").strip("/")


@pytest.mark.parametrize("pattern", ["", "/", "./", "//"])
def test_an_empty_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(CorpusError, match="is empty; write for example"):
        matches("a", pattern)
