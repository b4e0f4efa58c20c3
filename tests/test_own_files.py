"""Caches, downloads and run folders are excluded from every corpus."""

from pathlib import Path

import pytest
from folders import find
from training import fresh_accelerator, some_text, tiny_config

from charrnn.config import load_config
from charrnn.data.corpus import prepare
from charrnn.errors import ConfigError, CorpusError
from train.checkpoint.run_lock import exclusive
from train.run import run


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh_accelerator()
    Path("data").mkdir()
    Path("data/mine.txt").write_text(some_text())
    return tmp_path


def trained(*assignments):
    """A run of one step on ./data."""
    config = tiny_config(Path("elsewhere"), ["train.max_steps=1", "sample.length=0", *assignments])
    return run(config, config_name="tiny", resume=True)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("source", "run_dir"), [("data", "out"), (".", "checkpoints/a"), ("data", "data/run")])
def test_a_run_on_a_folder_with_its_own_files_resumes(source, run_dir):
    Path("elsewhere").mkdir()
    options = (f"data.source={source}", "data.cache_dir=data", f"train.run_dir={run_dir}")
    trained(*options)
    assert trained(*options).exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("pattern", ["data", "data/**", "data/*/*", "dat*/*/*"])
def test_caches_and_run_folders_are_skipped_with_one_note(pattern):
    prepare(load_config(None, {"data.source": "data/mine.txt", "data.cache_dir": "data"}).data)
    with exclusive(Path("data/run")):
        Path("data/run/metrics.jsonl").write_text("{}\n")
        Path("data/sub").mkdir()
        Path("data/sub/more.txt").write_text("text\n")
        found = find(pattern, cache_dir="cache")
    assert {part.path.name for part in found.parts} <= {"mine.txt", "more.txt"}
    [note] = found.notes
    assert "caches and run folders of charrnn" in note


@pytest.mark.usefixtures("here")
def test_a_cache_itself_is_refused():
    prepare(load_config(None, {"data.source": "data/mine.txt", "data.cache_dir": "data"}).data)
    with pytest.raises(CorpusError, match="data/prepared is a cache or run folder"):
        find("data/prepared")
    with pytest.raises(CorpusError, match="holds no text file"):
        find("data/prepared/*/*")


@pytest.mark.usefixtures("here")
def test_the_corpus_folder_is_refused_as_run_folder():
    Path("elsewhere").mkdir()
    with pytest.raises(ConfigError, match="choose another --run-dir"):
        trained("data.source=data", "train.run_dir=./data")


@pytest.mark.usefixtures("here")
def test_links_to_folders_are_reported():
    Path("other").mkdir()
    Path("other/a.txt").write_text("text\n")
    Path("data/link").symlink_to("../other", target_is_directory=True)
    found = find("data", cache_dir="cache")
    assert [part.path.name for part in found.parts] == ["mine.txt"]
    assert found.notes == ("skipped in data: 1 links to folders (link)",)


@pytest.mark.usefixtures("here")
def test_a_home_directory_is_expanded_in_run_dir(monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("elsewhere").mkdir()
    trained("data.source=data/mine.txt", "train.run_dir=~/run")
    assert Path("home/run/model.onnx").exists()
