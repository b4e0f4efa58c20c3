"""Decoding: independent of how the bytes are split; errors name the offset."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from charrnn.data.decode import Replaced, Rules, detect_encoding, read_texts
from charrnn.data.parts import Part
from charrnn.errors import CorpusError

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# Letters with marks that join them, reorder, or stay; syllables of Hangul in parts; what looks like two and is one.
TRICKY = "aé\u0301\u0327\u0344\u0958가\u1100\u1161\u11a8ﾊﾞﬁ😀\ufeff\ufffd\r\n\n\0\x1f 漢"
PLAIN = Rules()
tricky_texts = st.text(st.sampled_from(TRICKY), max_size=24)


def decoded(raw: bytes, size: int = 1 << 20, rules: Rules = PLAIN, replaced: Replaced | None = None) -> str:
    part = Part("novel.txt", None, 0, lambda: iter([raw[i : i + size] for i in range(0, len(raw), size)]))
    pieces = list(read_texts([part], rules, replaced or Replaced()))
    assert all(piece.utf8 in (None, piece.text.encode()) for piece in pieces)
    return "".join(piece.text for piece in pieces)


def expected(text: str, rules: Rules) -> str:
    text = text.removeprefix("\ufeff")
    if rules.newlines == "universal":
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if rules.normalize == "none" else unicodedata.normalize(rules.normalize, text)


rules = st.builds(Rules, newlines=st.sampled_from(["universal", "keep"]), normalize=st.sampled_from(["none", *FORMS]))


@given(tricky_texts, st.integers(1, 7), rules)
@example("e\r\u0301", 1, Rules(normalize="NFC"))
def test_where_the_chunks_end_does_not_show(text: str, size: int, rules: Rules) -> None:
    assert decoded(text.encode(), size, rules) == expected(text, rules)


@given(tricky_texts, st.integers(1, 7), st.sampled_from(["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"]))
def test_utf16_and_utf32_are_found_by_their_mark(text: str, size: int, codec: str) -> None:
    marks_itself = codec in ("utf-16", "utf-32")
    raw = (text if marks_itself else "\ufeff" + text).encode(codec)
    if raw.startswith(b"\xff\xfe\0\0") and "32" not in codec:
        return  # UTF-16 of a NUL, which looks like UTF-32
    assert decoded(raw, size) == expected("\ufeff" + text, Rules())


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("latin-1", "déjà vu\r\n"),
        ("cp1252", "“smart” – €"),
        ("koi8-r", "Привет, мир\r"),
        ("gb18030", "漢字😀 text"),
        ("shift-jis", "かな漢字"),
        ("iso2022-jp", "かなabc漢字"),
        ("utf-7", "Hé ++ 漢字"),
        ("cp037", "EBCDIC\r\ntext"),
        ("utf-8-sig", "é"),
        ("ascii", "plain\0\x1b"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_any_codec_of_python_can_be_named(codec: str, text: str, size: int) -> None:
    assert decoded(text.encode(codec), size, Rules(encoding=codec)) == expected(text, Rules())


@pytest.mark.parametrize(
    ("head", "codec"),
    [
        (b"\xff\xfea\0", "utf-16-le"),
        (b"\xfe\xff\0a", "utf-16-be"),
        (b"\xff\xfe\0\0", "utf-32-le"),
        (b"\0\0\xfe\xff", "utf-32-be"),
        (b"\xef\xbb\xbfa", "utf-8"),
        (b"abcd", "utf-8"),
        (b"", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
    ],
)
def test_byte_order_mark_selects_the_codec(head: bytes, codec: str) -> None:
    assert detect_encoding(head) == codec


# ---- faults


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("raw", "codec", "message"),
    [
        (b"abc\xffdef", "auto", "is not UTF-8 text: byte 0xff at offset 3;"),
        ("né".encode() + b"\xe2\x82", "auto", "is not UTF-8 text: byte 0xe2 at offset 3;"),
        ("né".encode("utf-16") + b"\0\xdc", "auto", "is not UTF-16-LE text: byte 0x00 at offset 6;"),
        (b"ab\xa4\xff", "gb18030", "is not GB18030 text: byte 0xa4 at offset 2;"),
        (b"ab\x80", "ascii", "is not ASCII text: byte 0x80 at offset 2;"),
        (b"a\0b\0", "utf-16", "is not UTF-16 text: UTF-16 stream does not start with BOM; name its byte order"),
    ],
)
def test_an_invalid_byte_is_named_with_its_place(raw: bytes, codec: str, message: str, size: int) -> None:
    with pytest.raises(CorpusError) as fault:
        decoded(raw, size, Rules(encoding=codec))
    assert f"novel.txt {message}" in str(fault.value)
    assert ("--set data.vocab=bytes" in str(fault.value)) == ("at offset" in message)


@given(st.binary(max_size=30), st.integers(1, 7))
@example(b"\xf0\x9f\x98a\xe2\x82", 2)
def test_replacement_equals_pythons_and_is_counted(raw: bytes, size: int) -> None:
    raw = b"a" + raw  # without a mark of another codec
    replaced, text = Replaced(), raw.decode("utf-8", "replace")
    assert decoded(raw, size, Rules(invalid="replace", newlines="keep"), replaced) == text
    assert replaced.count == text.count("\ufffd") - raw.count("\ufffd".encode())
    if replaced.count:
        with pytest.raises(UnicodeDecodeError) as fault:
            raw.decode()
        assert replaced.first == f"byte {fault.value.start} of novel.txt"


@pytest.mark.parametrize("codec", ["utf-16-le", "gb18030", "ascii"])
def test_replacing_works_for_any_codec(codec: str) -> None:
    raw, replaced = "ab".encode(codec) + b"\xff\xff" + "c".encode(codec), Replaced()
    text = decoded(raw, 3, Rules(invalid="replace", encoding=codec), replaced)
    assert text == raw.decode(codec, "replace")
    if "\ufffd" in text:
        assert replaced == Replaced(text.count("\ufffd"), f"byte {len('ab'.encode(codec))} of novel.txt")


def test_a_lone_surrogate_is_refused_or_replaced() -> None:
    raw = b"a\\ud83d\\u00e9"
    with pytest.raises(CorpusError, match=r"novel.txt has a lone surrogate, U\+D83D, .*data.invalid=replace"):
        decoded(raw, rules=Rules(encoding="raw-unicode-escape"))
    assert decoded(raw, rules=Rules(encoding="raw-unicode-escape", invalid="replace")) == "a\ufffdé"


def test_normal_forms_join_no_ascii_to_what_precedes() -> None:
    joining = set()
    for code in range(0x110000):
        fields = unicodedata.decomposition(chr(code)).split()
        if len(fields) == 2 and not fields[0].startswith("<"):
            joining.add(chr(int(fields[1], 16)))
    assert len(joining) > 50
    assert not [c for c in map(chr, range(0x80)) if c in joining or unicodedata.combining(c)]


def test_plain_text_is_passed_on_with_its_bytes() -> None:
    chunks = [b"one\n", "é".encode()[:1], "é".encode()[1:] + b"two"]
    pieces = read_texts([Part("novel.txt", None, 0, lambda: iter(chunks))], PLAIN, Replaced())
    assert list(pieces) == [("one\n", b"one\n"), ("étwo", "étwo".encode())]
