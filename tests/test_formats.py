"""File formats by content: compressed files, archives, records, and files that are not text."""

import bz2
import gzip
import json
import lzma
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from folders import find
from loopback import Site
from packed import COMPRESSORS, json_lines, write, write_parquet, write_zip

from charrnn.config import DataConfig
from charrnn.data import streams
from charrnn.data.corpus import prepare
from charrnn.data.parts import Part, Source
from charrnn.errors import CorpusError

pytestmark = pytest.mark.usefixtures("here")

VERSE = "Tyger Tyger, burning bright,\nIn the forests of the night;\n"


def content(source: Source) -> list[bytes | list[str]]:
    """Each part's bytes, or its records."""
    return [read(part) for part in source.parts]


def read(part: Part) -> bytes | list[str]:
    return list(part.documents()) if part.documents else b"".join(part.chunks())


def text_of(source: str, **fields: Any) -> str:
    corpus = prepare(DataConfig(source=source, split=(1, 0, 0), **fields))
    return corpus.vocab.decode(corpus.ids.tolist())


# ---- compressed files


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compression_is_detected_by_content(suffix: str) -> None:
    for name in (f"novel.txt.{suffix}", "novel.txt"):
        write(name, COMPRESSORS[suffix](VERSE.encode()))
        found = find(name)
        assert found.name == "novel"
        assert content(found) == [VERSE.encode()]
        assert text_of(name) == VERSE
        assert text_of(name, vocab="bytes") == VERSE


def test_a_file_with_a_compressed_files_name_may_be_plain() -> None:
    write("novel.txt.gz", VERSE)
    assert find("novel.txt.gz").parts[0].path == Path("novel.txt.gz")
    assert text_of("novel.txt.gz") == VERSE


def test_layers_are_unpacked_up_to_a_limit() -> None:
    layers = gzip.compress(bz2.compress(lzma.compress(VERSE.encode())))
    assert content(find(str(write("a.xz.bz2.gz", layers)))) == [VERSE.encode()]
    with pytest.raises(CorpusError, match="compressed more than 3 times over"):
        find(str(write("b.gz", gzip.compress(layers))))


def test_a_text_that_is_not_utf8_behind_a_compression_is_named() -> None:
    write("novel.txt.gz", gzip.compress(b"caf\xe9 noir"))
    with pytest.raises(CorpusError, match=r"novel.txt.gz is not UTF-8 text: .*offset 3"):
        text_of("novel.txt.gz")


# ---- zip archives


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_is_its_members_in_the_order_of_their_paths(method: int) -> None:
    write_zip("books.zip", {"b.txt": "two", "a/z.txt": VERSE * 100, "empty.txt": "", "a/": ""}, method)
    found = find("books.zip")
    assert found.name == "books"
    assert content(found) == [VERSE.encode() * 100, b"two", b""]
    assert text_of("books.zip") == VERSE * 100 + "two"


def test_what_a_folder_would_hide_in_an_archive_is_hidden() -> None:
    write_zip("books.zip", {"a.txt": "one", ".git/x": "x", "__MACOSX/._a.txt": "x", "b.png": b"\x89PNG\0\0"})
    found = find("books.zip")
    assert content(found) == [b"one"]
    [note] = found.notes
    assert "2 hidden (books.zip/.git/x, books.zip/__MACOSX/._a.txt)" in note
    assert "1 binary (books.zip/b.png)" in note
    assert content(find("books.zip", binary=True)) == [b"one", b"\x89PNG\0\0"]


def test_members_may_be_compressed_or_records() -> None:
    members = {
        "a.txt.gz": gzip.compress(b"one"),
        "b.jsonl": json_lines({"text": "two"}),
        "c.jsonl.xz": lzma.compress(b"\xef\xbb\xbf" + json_lines({"text": "three"})),
        "d.zip": write_zip("x", {"a": "b"}).read_bytes(),
    }
    found = find(str(write_zip("books.zip", members)))
    assert content(found) == [b"one", ["two"], ["three"]]
    assert "1 archive or Parquet file inside of another file (books.zip/d.zip)" in found.notes[0]


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(6, 1, r"a.zip is encrypted \(a.txt\); unpack it"), (8, 9, r"a.zip/a.txt uses an unsupported compression")],
)
def test_an_archive_that_cannot_be_read_is_refused(offset: int, value: int, message: str) -> None:
    """The flags or the method of the member's two headers are changed."""
    raw = bytearray(write_zip("a.zip", {"a.txt": "secret"}).read_bytes())
    for signature, moved in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        struct.pack_into("<H", raw, raw.index(signature) + offset + moved, value)
    write("a.zip", bytes(raw))
    with pytest.raises(CorpusError, match=message):
        find("a.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_named(method: int) -> None:
    raw = bytearray(write_zip("a.zip", {"a.txt": "one", "b.txt": VERSE * 9}, method).read_bytes())
    start = raw.rindex(b"b.txt", 0, raw.index(b"PK\x01\x02")) + 5
    raw[start + 40] ^= 1
    write("a.zip", bytes(raw))
    with pytest.raises(CorpusError, match=r"a.zip is a damaged zip file: b.txt: "):
        text_of("a.zip")


@pytest.mark.parametrize("cut", [5, 30, -1, -30])
def test_a_cut_archive_is_refused(cut: int) -> None:
    write("b.zip", write_zip("a.zip", {"a.txt": VERSE, "b.txt": VERSE}).read_bytes()[:cut])
    with pytest.raises(CorpusError, match=r"b.zip is a damaged zip file: "):
        text_of("b.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "UNCHECKED_BYTES", 1 << 20)
    write_zip("bomb.zip", {"zeros.txt": bytes(8 << 20)}, method)
    monkeypatch.setattr(streams.Stream, "open", None)
    with pytest.raises(CorpusError, match=r"bomb.zip/zeros.txt expands to more than 500 times its size"):
        find("bomb.zip")


def test_an_archive_without_text_is_refused() -> None:
    write_zip("a.zip", {})
    with pytest.raises(CorpusError, match=r"the archive a.zip holds no text file; it is empty"):
        find("a.zip")


def test_an_office_file_is_no_archive_of_texts() -> None:
    write_zip("a.docx", {"[Content_Types].xml": "<x/>", "word/document.xml": "<x/>"})
    with pytest.raises(CorpusError, match=r"a.docx is not text \(Office.*save it as plain text"):
        find("a.docx")
    assert find("a.docx", binary=True).parts[0].path == Path("a.docx")


# ---- records


def test_each_line_of_json_is_a_document() -> None:
    write("books.jsonl", json_lines({"text": "one\r\n", "id": 1}, {"text": ""}, {"text": "zw\u00f6\n"}) + b"\r\n\n")
    found = find("books.jsonl")
    assert found.name == "books"
    assert content(found) == [["one\r\n", "zw\u00f6\n"]]
    assert text_of("books.jsonl") == "one\nzw\u00f6\n"
    assert text_of("books.jsonl", document_end="|") == "one\n|zw\u00f6\n|"
    assert text_of("books.jsonl", vocab="bytes") == "one\r\nzw\u00f6\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": ', r"line 2: not JSON: .*; each line must be one object"),
        (b'["text"]', r"line 2: \[\"text\"\], and each line must be an object such as \{\"text\": \.\.\.\}"),
        (b'{"body": "a", "id": 1}', r"line 2: no field 'text' \(--text-field\); it has body, id"),
        (b'{"text": 3, "body": "a"}', r"line 2: the field 'text' holds 3, not a text; fields with text: body"),
        (b'{"text": null}', r"line 2: the field 'text' holds null, not a text"),
        (b'{"text": "caf\xe9"}', r"line 2: not JSON: 'utf-8' codec can't decode byte 0xe9 in position 13"),
        (b'{"text": "\\ud83d"}', r"line 2: a lone surrogate in 'text'"),
        (b"[" * 100_000, r"line 2: not JSON"),
        *(
            (json.dumps(value).encode(), "line 2: ")
            for value in (None, True, 1, 1.5, "x", [], {}, {"text": []}, {"text": {}})
        ),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named(line: bytes, why: str) -> None:
    write("books.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(CorpusError, match=rf"books.jsonl, {why}"):
        text_of("books.jsonl")


def test_surrogate_pairs_are_one_character() -> None:
    write("books.jsonl", b'{"text": "a\\ud83d\\ude00b"}\n{"text": "\\\\ud83d"}\n')
    assert content(find("books.jsonl")) == [["a\U0001f600b", "\\ud83d"]]


def test_endless_json_line_is_refused_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("charrnn.data.records.MAX_LINE_BYTES", 1 << 20)
    write("books.jsonl.gz", gzip.compress(b'{"text": "' + bytes(60 << 20)))
    with pytest.raises(CorpusError, match=r"books.jsonl.gz, line 1: longer than 1 MiB"):
        text_of("books.jsonl.gz")


def test_a_column_of_a_parquet_file_is_read_by_row_groups() -> None:
    texts = [f"text {number}\n" for number in range(2500)]
    write_parquet("books.parquet", {"id": list(range(2500)), "text": texts}, row_group_size=700)
    assert content(find("books.parquet")) == [texts]
    Path("books.parquet").rename("books")
    assert content(find("books")) == [texts]
    assert text_of("books") == "".join(texts)


def test_large_and_dictionary_coded_text_columns_are_text() -> None:
    import pyarrow as pa

    values = ["one", "two", "one", ""]
    columns = {"large": pa.array(values, pa.large_string()), "coded": pa.array(values).dictionary_encode()}
    write_parquet("a.parquet", columns)
    for field in columns:
        assert content(find("a.parquet", text_field=field)) == [["one", "two", "one"]]


def test_missing_parquet_column_lists_the_columns() -> None:
    write_parquet("a.parquet", {"body": ["one"], "id": [1]})
    with pytest.raises(CorpusError, match=r"a.parquet: no field 'text' \(--text-field\); it has body, id"):
        find("a.parquet")
    with pytest.raises(CorpusError, match=r"a.parquet: the field 'id' holds int64, not a text; fields with text: body"):
        find("a.parquet", text_field="id")


def test_two_columns_of_one_name_are_refused() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "a.parquet")
    with pytest.raises(CorpusError, match=r"a.parquet: several columns are named 'text'"):
        find("a.parquet")


def test_a_row_without_a_text_is_named() -> None:
    write_parquet("a.parquet", {"text": ["one", *["x"] * 1200, None]})
    with pytest.raises(CorpusError, match=r"a.parquet, row 1202: the field 'text' holds null"):
        text_of("a.parquet")


@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_a_damaged_parquet_file_is_refused(damage: str) -> None:
    raw = write_parquet("a.parquet", {"text": [VERSE * 20] * 50}).read_bytes()
    write("a.parquet", {"cut": raw[:-20], "garbled": raw[:20] + b"x" * 30 + raw[50:], "empty": b""}[damage])
    with pytest.raises(CorpusError, match=r"a.parquet is a damaged Parquet file: "):
        text_of("a.parquet")


def test_a_text_field_without_records_is_refused() -> None:
    write("novel.txt", VERSE)
    with pytest.raises(CorpusError, match=r"text_field is 'body', but novel.txt has no records"):
        find("novel.txt", text_field="body")


# ---- what is no text


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"%PDF-1.7\n", "PDF"), (b"7z\xbc\xaf\x27\x1c", "7-Zip archive"), (b"Rar!\x1a\x07\x01\0", "RAR archive")],
)
def test_a_known_kind_of_file_that_is_no_text_is_named(head: bytes, what: str) -> None:
    write("books/a", head + b"text")
    write("books/b.txt", "text")
    with pytest.raises(CorpusError, match=rf"books/a is not text \({what}\); save it as plain text"):
        find("books/a")
    assert f"1 {what} (a)" in find("books").notes[0]
    assert find("books/a", binary=True).parts[0].path == Path("books/a")


def test_a_tar_archive_is_named_also_behind_a_compression() -> None:
    import tarfile

    write("x/a.txt", VERSE)
    with tarfile.open("a.tar.gz", "w:gz") as archive:
        archive.add("x")
    with pytest.raises(CorpusError, match=r"a.tar.gz is not text \(tar archive\)"):
        find("a.tar.gz")


def test_nul_in_one_file_and_utf16_are_not_binary() -> None:
    assert text_of(str(write("novel.txt", "a\0b"))) == "a\0b"
    write("books/a.txt", VERSE.encode("utf-16"))
    assert len(find("books").parts) == 1


def test_named_wide_encoding_allows_nul_bytes() -> None:
    write("books/a.txt", VERSE.encode("utf-16-le"))
    with pytest.raises(CorpusError, match=r"1 binary \(a.txt\)"):
        find("books")
    assert text_of("books", encoding="utf-16-le") == VERSE
    with pytest.raises(CorpusError, match=r"1 binary \(a.txt\)"):
        find("books", encoding="latin-1")


# ---- folders, globs and patterns


def test_a_folder_reads_every_file_as_what_it_is() -> None:
    write("books/a.txt", "one")
    write("books/b.txt.gz", gzip.compress(b"two"))
    write_zip("books/c.zip", {"x/y.txt": "three", "z.md": "four"})
    write("books/d.jsonl", json_lines({"text": "five"}, {"text": "six"}))
    write_parquet("books/e.parquet", {"text": ["seven"]})
    expected = [b"one", b"two", b"three", b"four", ["five", "six"], ["seven"]]
    assert content(find("books")) == expected
    assert content(find("books/*")) == expected
    assert text_of("books", document_end="|") == "one|two|three|four|five|six|seven|"


def test_patterns_choose_files_and_archive_members() -> None:
    write("books/a.txt", "one")
    write("books/a.md", "x")
    write("books/old/b.txt", "x")
    write_zip("books/c.zip", {"x/y.txt": "two", "z.md": "x", "old/q.txt": "x"})
    for source in ("books", "books/**"):
        found = find(source, include=["*.txt"], exclude=["old"])
        assert content(found) == [b"one", b"two"]
        assert "2 excluded (c.zip/old/q.txt, old/b.txt)" in found.notes[0]
        assert "2 not included (a.md, c.zip/z.md)" in found.notes[0]
    assert content(find("books/c.zip", exclude=["*.md", "old"])) == [b"two"]
    assert text_of("books", include=["a.*"], exclude=["*.md"]) == "one"


def test_what_is_excluded_is_not_opened() -> None:
    write("books/a.txt", "one")
    write("books/b.zip", b"PK\x03\x04 damaged")
    with pytest.raises(CorpusError, match="damaged zip"):
        find("books")
    assert content(find("books", exclude=["*.zip"])) == [b"one"]


def test_patterns_that_match_nothing_are_refused() -> None:
    write("books/a.txt", "one")
    with pytest.raises(CorpusError, match=r"holds no text file; skipped in books: 1 not included \(a.txt\)"):
        find("books", include=["*.md"])


@pytest.mark.parametrize("source", ["novel.txt", "python"])
def test_patterns_are_refused_for_a_single_file(source: str) -> None:
    write("novel.txt", VERSE)
    with pytest.raises(
        CorpusError, match=r"choose files of a folder, glob, zip archive or the corpus novels, and \w+ is none"
    ):
        find(source, include=["*.txt"])


# ---- standard input and addresses


class _Piped:
    def __init__(self, raw: bytes) -> None:
        import io

        self.buffer = io.BytesIO(raw)

    def isatty(self) -> bool:
        return False


def everything() -> dict[str, tuple[bytes, list[bytes | list[str]]]]:
    packed = {suffix: (pack(VERSE.encode()), [VERSE.encode()]) for suffix, pack in COMPRESSORS.items()}
    archive = write_zip("made/a.zip", {"a.txt": "one", "b.jsonl": json_lines({"text": "two"})}).read_bytes()
    table = write_parquet("made/a.parquet", {"text": ["one", "two"]}).read_bytes()
    return packed | {"zip": (archive, [b"one", ["two"]]), "parquet": (table, [["one", "two"]])}


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst", "zip", "parquet"])
def test_standard_input_is_known_by_its_first_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, expected = everything()[kind]
    monkeypatch.setattr("sys.stdin", _Piped(raw))
    found = find("-")
    assert content(found) == expected
    assert found.name == "stdin"
    assert "standard input is saved as" in found.notes[0]


def test_text_field_makes_stdin_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json_lines({"text": "one"})
    monkeypatch.setattr("sys.stdin", _Piped(raw))
    assert content(find("-", text_field="text")) == [["one"]]
    monkeypatch.setattr("sys.stdin", _Piped(raw))
    assert content(find("-")) == [raw]


def test_an_address_of_compressed_json_lines_keeps_both_suffixes(site: Site) -> None:
    site.files["/books.jsonl.gz"] = gzip.compress(json_lines({"text": "one"}))
    found = find(f"{site.url}/books.jsonl.gz")
    assert (found.name, content(found)) == ("books", [["one"]])


# ---- without the extra


@pytest.mark.parametrize(
    ("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:a/b"), ("backports.zstd", "a.zst")]
)
def test_a_missing_package_is_named_with_its_extra(package: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    write_parquet("a.parquet", {"text": ["one"]})
    write("a.zst", COMPRESSORS["zst"](VERSE.encode()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.split(".")[0] == package.split(".")[0]:
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CorpusError, match=rf"needs the package {package}: pip install 'charrnn\[data\]'"):
        find(source)


# ---- damage of any kind


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst", "zip", "parquet"])
def test_a_file_with_any_damage_is_read_or_refused(kind: str) -> None:
    whole = everything()[kind][0]
    rng, refused = random.Random(kind), []
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(raw))
            if rng.random() < 0.7:
                raw[place] = rng.randrange(256)
            else:
                del raw[place : place + 5]
        write("damaged", bytes(raw) or b"x")
        try:
            for part in find("damaged").parts:
                list((part.documents or part.chunks)())
        except CorpusError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert "\n" not in "".join(refused)
