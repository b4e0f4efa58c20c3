"""Vocab: text to ids and back, unknown characters, the JSON form."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charrnn.errors import VocabError
from charrnn.vocab import Vocab

ABC = Vocab.of_chars("cab\n")
WITH_REPLACEMENT = Vocab("chars", ("a", "b", "?"), replacement="?")
texts = st.text(min_size=1)


@given(texts)
def test_decode_undoes_encode_for_the_texts_own_vocabulary(text):
    vocab = Vocab.of_chars(text)
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text
    assert len(ids) == len(text)
    assert ids.dtype == vocab.dtype
    assert ids.max() < len(vocab)


@given(st.text())
def test_decode_undoes_encode_for_bytes_and_any_text(text):
    vocab = Vocab.of_bytes()
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text
    assert ids.tolist() == list(text.encode())
    assert vocab.unknown_in(text) == []


def test_symbols_are_sorted_by_code_point_and_ids_are_positions():
    assert ABC.symbols == ("\n", "a", "b", "c")
    assert ABC.encode("abc\n").tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(("size", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (70_000, np.uint32)])
def test_ids_are_stored_in_the_narrowest_type(size, dtype):
    vocab = Vocab.of_chars(map(chr, range(0x20000, 0x20000 + size)))
    assert len(vocab) == size
    assert vocab.dtype == dtype
    assert vocab.encode(vocab.symbols[-1]).tolist() == [size - 1]


def test_an_unknown_character_is_listed_and_refused():
    with pytest.raises(VocabError) as caught:
        ABC.encode("a€b€é")
    message = str(caught.value)
    assert "3 character(s)" in message
    assert "'€' (U+20AC)" in message
    assert "'é' (U+00E9)" in message
    assert "\n" not in message


def test_a_long_list_of_unknown_characters_is_cut_and_counted():
    with pytest.raises(VocabError, match="and 14 more"):
        ABC.encode("".join(chr(0x400 + i) for i in range(24)))


@given(st.text("abcxyz\n"))
def test_skip_drops_the_unknown_characters_alone(text):
    assert ABC.decode(ABC.encode(text, "skip")) == "".join(c for c in text if c in "abc\n")


@given(st.text("ab?xyz"))
def test_replace_puts_the_replacement_for_each_unknown_character(text):
    ids = WITH_REPLACEMENT.encode(text, "replace")
    assert WITH_REPLACEMENT.decode(ids) == "".join(c if c in "ab?" else "?" for c in text)


def test_replace_without_a_replacement_entry_is_refused():
    with pytest.raises(VocabError, match="no replacement entry"):
        ABC.encode("x", "replace")
    assert ABC.encode("abc", "replace").tolist() == [1, 2, 3]


@given(st.text())
def test_unknown_in_names_exactly_what_encode_refuses(text):
    unknown = ABC.unknown_in(text)
    assert unknown == sorted(set(text) - set("abc\n"))
    if unknown:
        with pytest.raises(VocabError):
            ABC.encode(text)
    else:
        ABC.encode(text)


@pytest.mark.parametrize(
    ("vocab", "start"),
    [(ABC, "\n"), (Vocab.of_chars("xyz"), "x"), (Vocab.of_bytes(), "\n")],
    ids=["newline", "first", "bytes"],
)
def test_generation_starts_from_a_newline_or_the_first_entry(vocab, start):
    assert vocab.decode([vocab.start_id]) == start


@given(texts, st.booleans())
def test_json_round_trip(text, replaces):
    symbols = Vocab.of_chars(text).symbols
    vocab = Vocab("chars", symbols, symbols[-1] if replaces else None)
    assert Vocab.from_json(vocab.to_json()) == vocab
    assert vocab.to_json().isascii()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"chars"',
        "{}",
        "[" * 100_000,
        '{"kind": "words", "symbols": ["a"]}',
        '{"kind": "chars"}',
        '{"kind": "chars", "symbols": []}',
        '{"kind": "chars", "symbols": null}',
        '{"kind": "chars", "symbols": 5}',
        '{"kind": "chars", "symbols": ["a", "a"]}',
        '{"kind": "chars", "symbols": ["a", "bc"]}',
        '{"kind": "chars", "symbols": ["a", 1]}',
        '{"kind": "chars", "symbols": ["a", []]}',
        '{"kind": "chars", "symbols": ["a"], "replacement": "b"}',
        '{"kind": "bytes", "symbols": ["a"]}',
    ],
)
def test_what_is_no_vocabulary_is_refused_on_one_line(text):
    with pytest.raises(VocabError) as caught:
        Vocab.from_json(text)
    assert "\n" not in str(caught.value)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_json_is_a_vocabulary_or_a_vocab_error(value):
    if not isinstance(value, dict):
        value = {"kind": "chars", "symbols": value}
    try:
        vocab = Vocab.from_json(json.dumps(value))
    except VocabError:
        return
    assert len(vocab) == len(value["symbols"])


@given(st.text(min_size=1))
def test_byte_decoder_completes_characters_at_their_last_byte(text):
    decode = Vocab.of_bytes().decoder()
    for character in text:
        *first, last = character.encode()
        assert [decode(b) for b in first] == [""] * len(first)
        assert decode(last) == character
    assert decode(None) == ""


@given(st.binary())
def test_byte_decoder_yields_valid_text_for_any_bytes(raw):
    decode = Vocab.of_bytes().decoder()
    text = "".join(decode(b) for b in raw) + decode(None)
    assert text == raw.decode("utf-8", "replace")
    text.encode("utf-8")


@pytest.mark.parametrize("vocab", [Vocab.of_chars("ab|", "|"), Vocab.of_bytes("|")])
def test_the_document_end_is_a_symbol_and_survives_json(vocab: Vocab) -> None:
    again = Vocab.from_json(vocab.to_json())
    assert again == vocab
    assert again.decode([again.document_end_id]) == "|"
    plain = replace(vocab, document_end=None)
    assert "document_end" not in plain.to_json()
    assert Vocab.from_json(plain.to_json()) == plain
    assert plain.document_end_id is None


@pytest.mark.parametrize("end", ["c", "", "ab", 1, ["a"]])
def test_a_document_end_that_is_no_symbol_is_refused(end: object) -> None:
    with pytest.raises(VocabError, match="document end"):
        Vocab.from_json(json.dumps({"kind": "chars", "symbols": ["a", "b"], "document_end": end}))
    with pytest.raises(VocabError, match="document end"):
        Vocab.of_bytes("é")
