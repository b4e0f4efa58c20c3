"""docs/data.md: every command is accepted, and every corpus in it that needs no network is prepared."""

import gzip
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from launch_commands import accepted, training_options
from packed import json_lines, write, write_parquet, write_zip
from training import some_text
from typer.testing import CliRunner

from charrnn.data import inspect as inspection
from charrnn.data.corpus import prepare
from charrnn.errors import CorpusError
from train.loop.dataloader import window_plan

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
TRAINING = [line for line in LINES if "train/main.py" in line]
# The table's options, what else the cell says left out.
ROWS = [span for row in re.findall(r"^\|[^|]*\|(.*)\|$", TEXT, re.M) for span in re.findall(r"`(--data [^`]+)`", row)]
NEEDS_NETWORK = ("hf:roneneldan", "https://", "s3://", "shakespeare", "novels")
FIELDS = {"title": ["a", "b"], "body": [f"{some_text(3000)}\n", some_text(3000, seed=1)]}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the document's reader has."""
    import datasets

    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    text = some_text()
    write("novel.txt", text)
    write("novel.txt.gz", gzip.compress(text.encode()))
    write_zip("books.zip", {"part1/a.txt": text, "b.md": text})
    for name in ("books/a.md", "books/notes/x.txt", "books/notes/2019/y.md", "books/drafts/z.md", "books/deep/er/b.md"):
        write(name, text)
    write_parquet("posts.parquet", FIELDS)
    records = json_lines(*({"title": t, "body": b} for t, b in zip(*FIELDS.values(), strict=True)))
    write("posts.jsonl", records)
    write("posts/1.jsonl", records)
    write_parquet("posts/2.parquet", FIELDS)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": FIELDS["body"], **FIELDS})}).save_to_disk(
        "saved-dataset"
    )
    write("report.txt", text.encode("utf-16"))
    write("brief.txt", f"{text}caf\xe9\n".encode("latin-1"))
    write("log.txt", text.encode() + b"\xff\n")
    write("roman.txt", text + "".join(map(chr, range(0x4E00, 0x4E80))))
    write("photo.bmp", b"BM\0\0" + bytes(range(256)) * 50)
    write("diary.txt", text[:2000])
    write("letters.txt", text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return tmp_path


def prepared_ones(options: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The corpus, after checking that a run on it would have a batch; None when it needs a network."""
    config = accepted(options, monkeypatch, Path())
    if config.data.source.startswith(NEEDS_NETWORK):
        return None
    corpus = prepare(config.data)
    if config.data.batch_size == 128:  # the defaults are for larger texts than a test has
        config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 16, "batch_size": 8})})
    window_plan(config, len(corpus.train))
    return corpus


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("options", ROWS)
def test_arguments_in_the_table_train(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = prepared_ones(training_options(f"accelerate launch train/main.py {options}"), monkeypatch)
    assert corpus is None or corpus.num_chars > 1000


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_prepare_their_corpus(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = prepared_ones(training_options(line.split(" | ")[-1]), monkeypatch)
    assert corpus is None or corpus.num_chars > 1000


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("line", [line for line in LINES if "charrnn.data" in line])
def test_a_corpus_can_be_looked_at_as_shown(line: str) -> None:
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "charrnn.data", "inspect"]
    result = CliRunner().invoke(inspection.app, words[3:], catch_exceptions=False)
    assert result.exit_code == 0
    for part in ("entropy", "split", "lines"):
        assert part in result.output


def test_every_command_is_of_a_kind_that_is_tested_here() -> None:
    assert [line for line in LINES if "train/main.py" not in line and "charrnn.data inspect" not in line] == []


def test_every_kind_of_source_has_its_row() -> None:
    assert len(ROWS) > 15
    shown = " ".join(ROWS)
    for part in (
        ".gz",
        ".zip",
        ".jsonl",
        ".parquet",
        "hf:",
        "https://",
        "--data -",
        "s3://",
        "--init-from",
        "--include",
        "document_end",
    ):
        assert part in shown


@pytest.mark.usefixtures("reader")
def test_folder_command_selects_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in TRAINING if "2019" in line]
    corpus = prepare(accepted(training_options(line), monkeypatch, Path()).data)
    [note] = corpus.notes
    assert "2 excluded (drafts/z.md, notes/2019/y.md)" in note
    assert "1 not included (notes/x.txt)" in note


@pytest.mark.usefixtures("reader")
def test_the_small_text_is_too_small_for_the_plain_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = accepted(["--config", "configs/plain.yaml", "--data", "diary.txt"], monkeypatch, Path())
    with pytest.raises(CorpusError, match="too few for batch_size 128 x seq_len 128"):
        window_plan(config, len(prepare(config.data).train))
