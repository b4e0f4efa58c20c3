"""Fuzzing of the doors of training: command lines, config YAML, corpora. Seeds are in the tests' names.

`pytest -m slow tests/test_doors.py` tries a hundred times as much.
"""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from pathlib import Path

import pytest
import typer
from doors import enter, explained, is_one_line, mutated, nasty, words, write
from training import fresh_accelerator, make_trainer, some_text, tiny_config

from benchmarks.common import cli
from charrnn.cli import run_command
from charrnn.config import load_config
from charrnn.data import inspect as inspection
from charrnn.data.corpus import prepare
from charrnn.data.download import DownloadError
from charrnn.errors import CharRNNError, ConfigError
from train import evaluate, main
from train.distributed.setup import check_processes
from train.export import __main__ as export
from train.loop.dataloader import window_plan

ROOT = Path(__file__).parent.parent
LONG = pytest.mark.slow
SEEDS = [1, 2, *(pytest.param(seed, marks=LONG) for seed in range(3, 203))]
TRAIN = [
    "--config", "--data", "--include", "--exclude", "--text-field", "--vocab", "--rnn", "--epochs", "--max-steps",
    "--time-limit", "--run-dir", "--seed", "--resume", "--init-from", "--tracker", "--data-mirror", "--encoding",
    "--set", "--what",
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a text and a run on it."""
    folder = tmp_path_factory.mktemp("doors")
    make_trainer(
        tiny_config(folder, ["train.max_steps=1", "sample.length=0", "data.source=" + str(folder / "words.txt")])
    ).fit()
    return folder


@pytest.fixture
def here(shared, monkeypatch):
    monkeypatch.chdir(shared)
    monkeypatch.setenv("HOME", str(shared))
    monkeypatch.setattr("charrnn.data.download.urllib.request.urlopen", refuse)
    monkeypatch.setattr("charrnn.data.published.run_pip", without_network)
    fresh_accelerator()
    return shared


def refuse(*_, **__):
    raise OSError("no network")


def without_network(_):
    raise DownloadError("no network")


def until_training(config, *, config_name, resume, settings=None):
    """What a run does before its folder is made."""
    check_processes(config, 1)
    window_plan(config, len(prepare(config.data).train))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("seed", SEEDS)
def test_command_lines_of_training(seed, monkeypatch):
    monkeypatch.setattr("train.run.run", until_training)
    draw = random.Random(seed)
    for _ in range(25):
        enter(main.main, words(draw, TRAIN, []) + ["--data=words.txt"] * (draw.random() < 0.7))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("seed", SEEDS)
def test_command_lines_of_inspection(seed):
    draw = random.Random(seed)
    for _ in range(10):
        subject = "words.txt" if draw.random() < 0.5 else nasty(draw)
        enter(inspection.main, ["inspect", *words(draw, ["--config", "--set", "--json"], [subject])])


def options_of(command):
    """Every option of a typer command."""
    return [
        name for param in typer.main.get_command(cli(command)).params for name in param.opts if name.startswith("--")
    ]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("program", [evaluate, export], ids=["evaluate", "export"])
def test_command_lines_of_evaluation_and_export(seed, program):
    draw, options = random.Random(seed), options_of(program.command)

    def main():
        run_command(lambda: typer.run(program.command))

    for _ in range(4):
        enter(main, words(draw, options, ["run", "run", "run/best", nasty(draw)]))


@pytest.mark.parametrize("seed", SEEDS)
def test_config_yaml(tmp_path, seed):
    draw = random.Random(seed)
    shipped = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    for _ in range(15):
        content = mutated(draw, draw.choice(shipped))
        path = write(tmp_path / "c.yaml", content)
        with explained(content):
            try:
                load_config(path, {})
            except ConfigError as error:
                if not is_one_line(error):
                    raise


def packed(draw, text):
    """A text in one of the formats that are read."""
    kind = draw.randrange(9)
    if kind == 0:
        return "a.gz", gzip.compress(text)
    if kind == 1:
        return "a.bz2", bz2.compress(text)
    if kind == 2:
        return "a.xz", lzma.compress(text)
    if kind == 3:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", text)
            archive.writestr("b/c.txt", text[:100])
        return "a.zip", file.getvalue()
    if kind == 4:
        return "a.jsonl", b"\n".join(json.dumps({"text": line}).encode() for line in text.decode().splitlines())
    if kind == 5:
        return "a.txt", text.decode().encode(draw.choice(["utf-16", "utf-32", "utf-16-be", "latin-1"]))
    if kind == 6:
        return "a.txt", draw.randbytes(draw.choice([0, 1, 2, 3, 100, 9000]))
    if kind == 7:
        return draw.choice(["a.parquet", "a.pdf", "a.zst"]), draw.randbytes(100)
    return "a.txt", text


@pytest.mark.parametrize("seed", SEEDS)
def test_corpora(tmp_path, seed):
    draw = random.Random(seed)
    text = some_text(1500).encode()
    for n in range(12):
        name, content = packed(draw, text)
        content = mutated(draw, content) if draw.random() < 0.8 else content
        path = write(tmp_path / f"corpus-{n}" / name, content)
        options = [
            f"data.vocab={draw.choice(['chars', 'chars', 'bytes'])}",
            f"data.document_end={draw.choice(['', '', '|'])}",
            f"data.invalid={draw.choice(['refuse', 'replace'])}",
            f"data.newlines={draw.choice(['universal', 'keep'])}",
        ]
        source = str(path if draw.random() < 0.7 else path.parent)
        config = load_config(None, {"data.source": source, "data.cache_dir": str(tmp_path / "data")}, options)
        with explained((name, content, options)):
            try:
                corpus = prepare(config.data)
                assert int(corpus.ids.max()) < len(corpus.vocab)
                assert corpus.num_chars <= 8 * len(content) + 20_000
            except CharRNNError as error:
                if not is_one_line(error):
                    raise
