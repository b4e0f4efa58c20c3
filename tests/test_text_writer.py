"""TextWriter: what it holds back, stop texts, and the count of ids whose text is out."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from charrnn.vocab import Vocab
from infer.text_writer import TextWriter

AB = Vocab.of_chars("ab|", document_end="|")


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
@example("baa", ["a", "baa"])
def test_text_ends_before_the_first_stop_and_no_more_is_held_back(text, stops):
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    end = min(found)[1] if found else len(text)
    writer, written = TextWriter(AB, stops), ""
    for n, i in enumerate(AB.encode(text).tolist(), 1):
        written += writer.feed([i])
        if writer.ended:
            break
        seen = text[:n]
        held = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
        assert written == seen[: n - held]
    written += writer.end()
    assert written == text[:end] == TextWriter(AB, stops).feed(AB.encode(text + 5 * "|").tolist())
    assert writer.ended == bool(found)
    assert writer.count == len(written)


@given(st.binary(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=1), st.integers(0, 40))
def test_bytes_come_out_as_whole_characters_and_are_counted(raw, stops, cut):
    writer = TextWriter(Vocab.of_bytes(), stops)
    text = raw.decode("utf-8", "replace")
    written = writer.feed(list(raw[:cut])) + writer.feed(list(raw[cut:])) + writer.end()
    assert written == (text.split(stops[0])[0] if stops else text)
    assert writer.ended or writer.count == len(raw)


@pytest.mark.parametrize(("raw", "count"), [(b"abc\xf0\x9f", 5), ("a\u00e9;b".encode(), 3), (b"\xff\xfe", 2)])
def test_count_with_incomplete_bytes_and_stops(raw, count):
    writer = TextWriter(Vocab.of_bytes(), [";"])
    assert writer.feed(list(raw[:2])) + writer.feed(list(raw[2:])) + writer.end()
    assert writer.count == count
