"""Decompression: exact; damaged and truncated files are refused; memory and expansion are bounded."""

import contextlib
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import COMPRESSORS

from charrnn import io as storage
from charrnn.data import streams
from charrnn.data.streams import Stream, compression_of
from charrnn.errors import CorpusError

KINDS = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "Zstandard"}
RAW = random.Random(1).randbytes(3000) + b"text\n" * 2000


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with contextlib.chdir(tmp_path_factory.mktemp("streams")):
        yield


def unpack(packed: bytes, suffix: str) -> bytes:
    Path("a.bin").write_bytes(packed)
    return b"".join(Stream(Path("a.bin"), len(packed), "a.bin", layers=(KINDS[suffix],)).chunks())


@pytest.mark.parametrize("suffix", KINDS)
def test_each_kind_is_known_by_its_first_bytes(suffix: str) -> None:
    for raw in (b"", b"a", RAW):
        assert compression_of(COMPRESSORS[suffix](raw)[:8192]) == KINDS[suffix]


@pytest.mark.parametrize(
    "head", [b"", b"B", b"BZh", b"BZh9 is how a text may begin", b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/"]
)
def test_what_only_looks_like_one_is_none(head: bytes) -> None:
    assert compression_of(head) == ""


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("read_bytes", [1, 7, 1000, 1 << 20])
def test_what_was_packed_comes_out_however_it_is_read(
    suffix: str, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 50)
    monkeypatch.setattr(streams, "_READ_BYTES", read_bytes)
    assert unpack(COMPRESSORS[suffix](RAW), suffix) == RAW


@settings(max_examples=60)
@given(
    suffix=st.sampled_from(list(KINDS)),
    raws=st.lists(st.binary(max_size=40), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    read_bytes=st.integers(1, 60),
)
def test_concatenated_streams_are_one(suffix: str, raws: list[bytes], padding: int, read_bytes: int) -> None:
    packed = (b"\0" * 4 * padding).join(map(COMPRESSORS[suffix], raws))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_READ_BYTES", read_bytes)
        assert unpack(packed, suffix) == b"".join(raws)


def test_a_frame_to_be_skipped_is_skipped() -> None:
    packed = b"\x50\x2a\x4d\x18\x03\0\0\0abc" + COMPRESSORS["zst"](RAW)
    assert compression_of(packed[:100]) == "Zstandard"
    assert unpack(packed, "zst") == RAW


@pytest.mark.parametrize("suffix", KINDS)
def test_every_cut_flip_and_appendix_is_noticed(suffix: str) -> None:
    packed = COMPRESSORS[suffix](RAW)
    cuts = [1, 3, 8, len(packed) // 3, len(packed) // 2, len(packed) - 9, len(packed) - 1]
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 4
    for damaged in (*(packed[:cut] for cut in cuts), bytes(flipped), packed + b"rubbish that is long enough"):
        with pytest.raises(CorpusError, match=f"a.bin is a damaged {KINDS[suffix]} file: .*download it again"):
            unpack(damaged, suffix)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_bomb_is_refused_in_little_memory(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "UNCHECKED_BYTES", 16 << 20)
    packed = COMPRESSORS[suffix](bytes(40 << 20))
    assert len(packed) < 60_000
    tracemalloc.start()
    try:
        with pytest.raises(CorpusError, match="more than 500 times its size"):
            unpack(packed, suffix)
        # A piece and its copy; Zstandard's own buffers are not Python's, and come to a few MB.
        assert tracemalloc.get_traced_memory()[1] < 45 << 20
    finally:
        tracemalloc.stop()


def test_a_stream_that_asks_for_a_huge_window_is_refused() -> None:
    # A frame header that asks for 2 GiB: no single segment, exponent 21.
    with pytest.raises(CorpusError, match=r"damaged Zstandard file: .*"):
        unpack(b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(20), "zst")
