"""`python -m charrnn.data inspect`, compared with plain counting."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from charrnn.data import stats
from charrnn.data.inspect import app

ROOT = Path(__file__).parent.parent


def plain_entropy(text, order):
    """H(next | the `order` before), of all runs of four characters, by dictionaries."""
    length = min(4, len(text))
    runs = [text[i : i + length] for i in range(len(text) - length + 1)]
    pairs = Counter((run[:order], run[order]) for run in runs)
    contexts = Counter(run[:order] for run in runs)
    return -sum(n / len(runs) * math.log2(n / contexts[context]) for (context, _), n in pairs.items())


@given(text=st.text("ab\nc", min_size=1, max_size=60))
@settings(max_examples=60)
def test_entropies_equal_plain_counting(text):
    found = stats.entropies(np.frombuffer(text.encode(), np.uint8), 256)
    assert found.counted == len(text)
    assert found.bits == pytest.approx([plain_entropy(text, k) for k in range(min(4, len(text)))], abs=1e-9)


def test_wide_ids_and_the_cap(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 200_000, 5000).astype(np.uint32)
    assert len(stats.entropies(ids, 200_000).bits) == 3  # 4 x 18 bits would not fit into 64
    monkeypatch.setattr(stats, "SAMPLE_CHARS", 800)
    sampled = stats.entropies(ids, 200_000)
    assert sampled.counted == 800
    assert "counted on 800 of 5,000" in sampled.line()


@given(text=st.text("ab\n", min_size=1, max_size=60), chunk=st.integers(1, 20))
@settings(max_examples=100)
def test_lines_are_those_of_plain_counting_wherever_blocks_end(text, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_CHUNK", chunk)
        found = stats.count_lines(np.frombuffer(text.encode(), np.uint8), ord("\n"))
    expected = text.removesuffix("\n").split("\n")
    assert found["count"] == found["compared"] == len(expected)
    assert found["longest"] == max(map(len, expected)) == len(expected[found["longest_at"] - 1])
    some = Counter(line for line in expected if line)
    assert found["repeated"] == sum(n - 1 for n in some.values())
    assert found["repeated_chars"] == sum(len(line) * (n - 1) for line, n in some.items())
    sizes = {"0": [0], "1": [1], "2-3": [2, 3], "4-7": range(4, 8), "8-15": range(8, 16)}
    counts = {name: sum(len(line) in sizes[name] for line in expected) for name in sizes}
    assert [found["lengths"].get(name, 0) for name in sizes] == list(counts.values())
    assert sum(found["lengths"].values()) == len(expected)


def test_text_output_equals_the_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for name, text in {"a.txt": "one\ntwo\n\none\n", "b.txt": "three é\n", "c.txt": "three é\n"}.items():
        Path("texts", name).write_text(text, encoding="utf-8")
    facts = json.loads(CliRunner().invoke(app, ["inspect", "texts", "--json"]).stdout)
    assert facts["characters"] == 29
    assert facts["alphabet"]["é"] == 2
    assert facts["documents"] == {"count": 3, "repeated": 1}
    assert (facts["lines"]["count"], facts["lines"]["repeated"], facts["lines"]["longest"]) == (6, 2, 7)
    assert facts["split"] == {"train": 26, "val": 3, "test": 0}
    assert facts["entropy"]["bits_per_char"][3] < facts["entropy"]["bits_per_char"][0]
    page = CliRunner().invoke(app, ["inspect", "texts"]).stdout
    for part in ("29 characters", "order 3:", "2 of 5 lines", "documents  3; 1 equal", "'é'", "train 26, val 3"):
        assert part in page
