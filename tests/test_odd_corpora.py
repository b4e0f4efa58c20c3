"""Unusable and random input becomes a corpus or a one-line error."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import fresh_accelerator, make_trainer, some_text, tiny_config

from charrnn.config import DataConfig, load_config
from charrnn.data.corpus import prepare
from charrnn.errors import CharRNNError, CheckpointError, CorpusError
from charrnn.io import MARKER
from charrnn.windows import WindowPlan
from train.run import run

ROOT = Path(__file__).parent.parent
SHAKESPEARE = ROOT / "configs" / "shakespeare.yaml"
NAMED = re.compile(r"--set data\.seq_len=(\d+) --set data\.batch_size=(\d+) would fit")


@given(
    num_chars=st.integers(2, 3000),
    seq_len=st.integers(1, 200),
    batch_size=st.integers(1, 300),
    windows=st.sampled_from(["sliding", "carry"]),
    stride=st.integers(0, 300),
)
@settings(max_examples=300)
def test_what_a_refusal_names_fits(num_chars, seq_len, batch_size, windows, stride):
    try:
        WindowPlan(num_chars, seq_len, batch_size, windows, stride, 1)
    except CorpusError as error:
        if named := NAMED.search(str(error)):
            seq_len, batch_size = map(int, named.groups())
            assert WindowPlan(num_chars, seq_len, batch_size, windows, stride, 1).steps_per_epoch >= 1
        else:
            assert num_chars < 10  # not even a window of 8


def test_diary_trains_with_the_suggested_settings(tmp_path):
    (tmp_path / "diary.txt").write_text(some_text(2048))
    fields = {
        "data.source": str(tmp_path / "diary.txt"),
        "data.cache_dir": str(tmp_path / "data"),
        "train.run_dir": str(tmp_path / "run"),
        "train.time_limit": "0s",
        "train.max_steps": 2,
        "train.mixed_precision": "no",
    }
    with pytest.raises(CorpusError) as refusal:
        make_trainer(load_config(SHAKESPEARE, fields))
    assert not (tmp_path / "run").exists()
    named = re.findall(r"--set (\S+)", str(refusal.value))
    trainer = make_trainer(load_config(SHAKESPEARE, fields, named))
    trainer.fit()
    assert trainer.progress.step == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"is empty; name a text"),
        (b"some words and no more\n" * 3, r"too few for batch_size 128 x seq_len 128 .* would fit"),
        (bytes(range(256)) * 20, r"not UTF-8.*byte 0x80 at offset 128.*data\.vocab=bytes"),
    ],
)
def test_unusable_text_is_refused_before_a_run_folder(content, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.loop.trainer.CharRNN", lambda *_: pytest.fail("a model was built"))
    Path("odd.txt").write_bytes(content)
    fresh_accelerator()
    config = load_config(None, {"data.source": "odd.txt", "train.run_dir": "run"})
    with pytest.raises(CorpusError, match=why) as refusal:
        run(config, config_name="odd", resume=True)
    assert str(refusal.value).isprintable()
    assert not Path("run").exists()


def test_changed_corpus_is_refused_on_resume(tmp_path):
    first = make_trainer(tiny_config(tmp_path))
    first.fit()
    (tmp_path / "words.txt").write_text(some_text(seed=9))
    config = tiny_config(tmp_path)
    changed = prepare(config.data).sha256
    with pytest.raises(CheckpointError, match=f"{first.data.corpus.sha256[:12]}.*{changed[:12]}"):
        make_trainer(config)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody without rights"
)
def test_a_text_without_permission_is_named(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text(some_text())
    secret.chmod(0)
    tmp_path.chmod(0o755)
    nobody = 65534
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir("/")
            for folder in (tmp_path, *tmp_path.parents):
                if str(folder).startswith("/tmp/"):
                    folder.chmod(0o755)
            os.setuid(nobody)
            prepare(DataConfig(source=str(secret), cache_dir=str(tmp_path / "data")))
        except CorpusError as error:
            code = 0 if f"{secret}: Permission denied" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


ODD_NAMES = st.text("ab -\n.é漢*[\\'\"", min_size=1, max_size=12).filter(lambda n: n.strip(".") and "/" not in n)
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text("ab\r\n\u0301é", max_size=100).map(lambda text: text.encode("utf-16")),
    st.text("ab \n", min_size=20, max_size=100).map(str.encode),
    st.sampled_from(
        [b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"BZh9", b"\xfd7zXZ\x00", b"(\xb5/\xfd", b"%PDF-1.4", b"\xef\xbb\xbf"]
    ),
)
KINDS = st.sampled_from(["file", "file", "file", "file", "link", "loop", "dangling", "fifo", "folder"])
SHAPES = st.lists(st.tuples(ODD_NAMES, KINDS, CONTENT), max_size=6)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "vocab": st.sampled_from(["chars", "bytes"]),
        "encoding": st.sampled_from(["auto", "latin-1", "utf-16", "cp1252", "utf-8", "shift-jis"]),
        "invalid": st.sampled_from(["refuse", "replace"]),
        "newlines": st.sampled_from(["universal", "keep"]),
        "normalize": st.sampled_from(["none", "NFC", "NFKD"]),
        "min_count": st.integers(1, 3),
        "document_end": st.sampled_from(["", "\0", "a"]),
        "include": st.sampled_from([(), ("*a*",), ("[",)]),
    },
)


def build(root, shapes):
    root.mkdir()
    for name, kind, content in shapes:
        path = root / name
        if path.exists() or path.is_symlink():
            continue
        if kind == "file":
            path.write_bytes(content)
        elif kind == "link":
            path.symlink_to(root.parent / "outside.txt")
        elif kind == "loop":
            path.symlink_to(root, target_is_directory=True)
        elif kind == "dangling":
            path.symlink_to(root / "nowhere")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
            (path / "inner.txt").write_bytes(content)


def hold_to_it(shapes, options, single):
    """Prepares what `shapes` builds; a corpus, or one line, and either way nothing half-made."""
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "outside.txt").write_text("a text from elsewhere\n")
        build(folder / "root", shapes)
        target = folder / "root" / shapes[0][0] if single and shapes else folder / "root"
        try:
            config = DataConfig(source=str(target), cache_dir=str(folder / "data"), split=(0.5, 0.5, 0.0), **options)
        except ValueError:  # options that have no meaning together, which test_config.py holds
            return
        told = ""
        try:
            corpus = prepare(config)
        except CharRNNError as error:
            told = str(error)
        else:
            assert 2 <= corpus.num_chars == len(corpus.ids)
            assert int(corpus.ids.max()) < len(corpus.vocab)
            check_text(corpus, target, options)
        assert told.isprintable()
        left = [p for p in (folder / "data").rglob(".*") if not p.name.endswith(".lock") and p.name != MARKER]
        assert not left
        for entry in (folder / "data" / "prepared").glob("[!.]*"):
            assert {p.name for p in entry.iterdir()} == {"ids.bin", "meta.json"}
    finally:
        shutil.rmtree(folder)


def check_text(corpus, target, options):
    """A single file's ids are its text, where no option but line ends changes it and Python reads it as plain UTF-8."""
    plain = set(options) <= {"vocab", "newlines", "invalid"} or all(not v for v in options.values())
    if not (plain and target.is_file()):
        return
    raw = target.read_bytes()
    if options.get("vocab") == "bytes":
        if raw[:2] in (b"\x1f\x8b", b"PK", b"BZ", b"\xfd7", b"(\xb5"):
            return
        assert corpus.ids.tobytes() == raw
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return
    if options.get("newlines", "universal") == "universal":
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert corpus.vocab.decode(corpus.ids) == text


FUZZ = {"suppress_health_check": list(HealthCheck), "derandomize": False}


@given(shapes=SHAPES, options=OPTIONS, single=st.booleans())
@settings(max_examples=200, **FUZZ)
def test_anything_becomes_a_corpus_or_one_line(shapes, options, single):
    hold_to_it(shapes, options, single)


@pytest.mark.slow
@given(shapes=SHAPES, options=OPTIONS, single=st.booleans())
@settings(max_examples=2000, **FUZZ)
def test_anything_becomes_a_corpus_or_one_line_for_longer(shapes, options, single):
    hold_to_it(shapes, options, single)
