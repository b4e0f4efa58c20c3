"""Texts given to evaluation and export: they have their own options, and not the run's."""

import json
import os
from pathlib import Path

import pytest
from training import make_trainer, some_text, tiny_config
from typer.testing import CliRunner

from benchmarks.common import cli
from charrnn.errors import ConfigError, ExportError
from train import evaluate
from train.export import exporter as export
from train.export.__main__ import command
from train.given_text import GivenText


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on the .md files of texts/."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.md").write_text(some_text())
    (folder / "texts" / "b.txt").write_text("0123456789" * 100)
    options = [f"data.source={folder / 'texts'}", "data.include=['*.md']", "sample.length=0"]
    make_trainer(tiny_config(folder, options)).fit()
    (folder / "latin.txt").write_text("the quick brown fox \n" * 90, encoding="utf-16-le")
    return folder


def test_a_given_text_has_its_own_options(folder):
    run, other = str(folder / "run"), str(folder / "texts" / "a.md")
    app = cli(evaluate.command)
    own = CliRunner().invoke(app, [run, "--json"])
    assert own.exit_code == 0, own.output
    one = CliRunner().invoke(app, [run, "--data", other, "--json"])  # a file has no include
    assert one.exit_code == 0, one.output
    last = [json.loads(done.stdout.splitlines()[-1]) for done in (own, one)]
    assert last[0] == last[1]
    folder_again = [run, "--data", str(folder / "texts"), "--include", "*.md", "--json"]
    assert json.loads(CliRunner().invoke(app, folder_again).stdout.splitlines()[-1]) == last[0]
    wide = [run, "--data", str(folder / "latin.txt"), "--encoding", "utf-16-le", "--json"]
    assert CliRunner().invoke(app, wide).exit_code == 0


def test_an_export_measures_on_a_given_text(folder):
    out, text = folder / "m.onnx", GivenText(str(folder / "texts" / "a.md"))
    _, _, line = export.export(folder / "run", out, "int8", text)
    assert "validation loss stream" in line
    with pytest.raises(ConfigError, match="name it with --data"):
        command(folder / "run", out, include=["*.md"])


@pytest.mark.parametrize("out", [".", "/", "texts"])
def test_a_folder_is_no_file_to_export_to(folder, out, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ExportError, match="is a folder; name a file in it"):
        export.export(Path("run"), Path(out), "fp32", None)


def test_a_device_or_pipe_is_not_replaced(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(ExportError, match="not a regular file"):
        export.export(folder / "run", folder / "pipe", "fp32", None)
    assert (folder / "pipe").is_fifo()


@pytest.mark.parametrize("program", [evaluate.command, command])
def test_help_shows_the_defaults(program):
    shown = CliRunner().invoke(cli(program), ["--help"], env={"COLUMNS": "200"}).output
    shown = " ".join(shown.replace("│", " ").replace("(", "").split())
    assert "default: " in shown
    for default in {
        evaluate.command: ["the one it was trained on", "as it was"],
        command: ["model.onnx or model-int8"],
    }[program]:
        assert f"default: {default}" in shown
