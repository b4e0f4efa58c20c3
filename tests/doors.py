"""The property that every door of ours has, whatever comes in: an answer, or one line that says what is wrong.

Seeds: CHARRNN_FUZZ_SEED chooses others; a failing test prints the one it had.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
import pytest

MOST_S = 60.0
MOST_MIB = 1024


def generator(seed: int) -> np.random.Generator:
    """Random numbers of a test, whose seed pytest shows when it fails."""
    seed += int(os.environ.get("CHARRNN_FUZZ_SEED", "0"))
    print(f"seed {seed}: CHARRNN_FUZZ_SEED={os.environ.get('CHARRNN_FUZZ_SEED', '0')}")
    return np.random.default_rng(seed)


@contextmanager
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
