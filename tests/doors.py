"""The property that holds at every door: whatever comes in, exit code 0 or 2, one line, no traceback, bounded time."""

import contextlib
import io
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from unittest import mock

import numpy as np
import pytest

from charrnn.config import field_names

MOST_S = 60.0
MOST_MIB = 1024
CPU_S = 20.0  # of one call; none should take a second
# No folder that holds half a disk, and no address that answers.
NASTY = [
    "", " ", "-", "--", ".", "~", "~no-such-user", "0", "-0", "-1", "1", "2", "010", "0x10",
    "1_0", "1:30", "1e3", "1e999",
    "nan", "inf", "-inf", ".inf", ".nan", "9" * 20, "9" * 5000, "1." + "0" * 400, "true", "yes", "no",
    "null", "none", "auto",
    "a" * 300, "a/" * 2000, "\udcff", "\x1b[31m", "\x00"[:0], "\u2028", "é", "💥", "a\nb", "[", "]",
    "{", "}", "[" * 5000, "|", ">",
    "&a", "*a", "!!python/object:os.system", "%TAG", "'", '"', "\\", "*", "**", "?", "[!]",
    "/dev/null", "/dev/zero", "/proc/self/mem",
    "missing/a", "hf:", "memory://", "ftp://", "x+y://a",
    "hf:" + "9" * 50, "s3://a/b", "file:///etc",
    "http://", "http://[", "http://127.0.0.1:1/x", "chars", "bytes", "keep", "GRU", "LSTM",
    "words.txt", "words.txt/x", "run", "run/best",
    "90s", "1h30m", "0.9,0.1,0", "1,1,1", ",,", "2024-99-99", "int8", "test", "*.txt",
]  # fmt: skip


def words(draw: random.Random, options: list[str], subjects: list[str]) -> list[str]:
    """A command line: up to five options with values that are mostly nasty, around one of `subjects`."""
    line = [draw.choice(subjects)] if subjects else []
    for _ in range(draw.randint(0 if subjects else 1, 5)):
        option = draw.choice(options)
        value = nasty(draw)
        if option == "--set":
            value = f"{draw.choice([*field_names(), 'a.b', 'data', ''])}={value}"
        line += [option] if draw.random() < 0.05 else [option, value] if draw.random() < 0.7 else [f"{option}={value}"]
    return line


def nasty(draw: random.Random) -> str:
    """A value that somebody has to refuse, mostly."""
    if draw.random() < 0.8:
        return draw.choice(NASTY)
    return "".join(map(chr, draw.choices(range(1, 0x3000), k=draw.randint(1, 20))))


@contextlib.contextmanager
def explained(what: object) -> Iterator[None]:
    """Names the input of a failure."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {what!r}")
        raise


def enter(main: Callable[[], None], line: list[str]) -> int:
    """Runs a program with a command line; returns its exit code. Raises: AssertionError, or the traceback's error."""
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with explained(line), mock.patch.object(sys, "argv", ["program", *line]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
        assert code in (0, 2), err.getvalue()
        said = err.getvalue()
        assert "Traceback" not in said
        if code:
            lines = said.strip().splitlines()
            # typer frames what it refuses; ours is the last line, and one.
            assert lines[-1].startswith(("error: ", "╰", "+-")), said
            assert len(lines[-1]) < 4000
        assert time.process_time() - began < CPU_S
    return code


def mutated(draw: random.Random, content: bytes) -> bytes:
    """The content with a few bytes changed, cut out, doubled or put in."""
    out = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(out) + 1)
        kind = draw.randrange(4)
        if kind == 0 and at < len(out):
            out[at] = draw.randrange(256)
        elif kind == 1:
            del out[at : at + draw.choice([1, 2, 10, 1000])]
        elif kind == 2:
            out[at:at] = out[at : at + draw.choice([1, 5, 50])]
        else:
            out[at:at] = nasty(draw).encode("utf-8", "surrogateescape" if draw.random() < 0.5 else "replace")
    return bytes(out)


def write(path: Path, content: bytes) -> Path:
    """The file, made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def is_one_line(error: Exception) -> bool:
    """Whether its message is one, of bearable length."""
    return "\n" not in str(error) and len(str(error)) < 20_000


def generator(seed: int) -> np.random.Generator:
    """Random numbers of a test, whose seed pytest shows when it fails; CHARRNN_FUZZ_SEED chooses others."""
    seed += int(os.environ.get("CHARRNN_FUZZ_SEED", "0"))
    print(f"seed {seed}: CHARRNN_FUZZ_SEED={os.environ.get('CHARRNN_FUZZ_SEED', '0')}")
    return np.random.default_rng(seed)


@contextlib.contextmanager
def bounded(what: object, seconds: float = MOST_S, mib: float = MOST_MIB) -> Iterator[None]:
    """Fails when its body takes longer, or makes the process's peak of memory higher by more."""
    began, peak = perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    took, more = perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    if sys.platform == "darwin":
        more /= 1024
    assert took < seconds, f"{what!r} took {took:.1f} s"
    assert more < mib, f"{what!r} took {more:.0f} MiB"


def check_command(command: object, code: int, out: str, err: str) -> None:
    """A command ended with 0, or with 2 and one line on stderr; nowhere is a traceback, or what a terminal obeys."""
    try:
        assert code in (0, 2)
        assert "Traceback" not in err
        assert err.replace("\n", "").isprintable()
        if code == 2:
            assert out == ""
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            assert len(err) < 10_000
    except AssertionError as error:
        pytest.fail(f"{command!r} ended with {code}, {err[-2000:]!r}: {error}")
