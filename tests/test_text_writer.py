"""TextWriter: several stop texts at once, and the count of ids whose text is out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charrnn.vocab import Vocab
from infer.text_writer import TextWriter

AB = Vocab.of_chars("ab|", document_end="|")


def pieces_of(writer, ids, cut):
    return [writer.feed(ids[:cut]), writer.feed(ids[cut:]), writer.end()]


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.integers(0, 20))
def test_text_ends_before_the_earliest_stop(text, stops, cut):
    found = [at for at in map(text.find, stops) if at >= 0]
    writer = TextWriter(AB, stops)
    written = "".join(pieces_of(writer, AB.encode(text).tolist(), cut))
    assert written == text[: min(found, default=len(text))]
    assert writer.ended == bool(found)
    assert writer.count == len(written)


@given(st.text(max_size=20), st.integers(0, 80))
def test_count_is_in_bytes_for_a_byte_vocabulary(text, cut):
    writer = TextWriter(Vocab.of_bytes())
    raw = text.encode("utf-8", "replace")
    assert "".join(pieces_of(writer, list(raw), cut)).encode() == raw
    assert writer.count == len(raw)


@pytest.mark.parametrize(("raw", "count"), [(b"abc\xf0\x9f", 5), ("a\u00e9;b".encode(), 3), (b"\xff\xfe", 2)])
def test_count_with_incomplete_bytes_and_stops(raw, count):
    writer = TextWriter(Vocab.of_bytes(), [";"])
    assert pieces_of(writer, list(raw), 2)
    assert writer.count == count
