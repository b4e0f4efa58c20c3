"""What a run writes down: no user, password or query of an address; and no tracker run where nothing was trained."""

from pathlib import Path

import numpy as np
import pytest
from training import fresh_accelerator, some_text, tiny_config

from charrnn.data.corpus import prepare
from charrnn.data.download import without_credentials
from charrnn.errors import CorpusError
from train.loop.dataloader import IdSource
from train.run import run


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:secret@host:80/a/b.txt?token=secret#x", "https://host:80/a/b.txt"),
        ("https://host/a@b.txt", "https://host/a@b.txt"),
        ("--data=https://secret@host/a.txt?q", "--data=https://host/a.txt"),
        ("hf:name", "hf:name"),
        ("what?.txt", "what?.txt"),
    ],
)
def test_credentials_are_removed_from_addresses(text, clean):
    assert without_credentials(text) == clean


def test_token_is_not_written_and_no_tracker_reopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh_accelerator()
    opened = []
    monkeypatch.setattr("train.run.make_tracker", lambda t, *rest: opened.append((t.tracker, rest)))
    monkeypatch.setattr("charrnn.data.remote.download", lambda url, target, **_: target.write_text(some_text()))
    address = "https://user:secret@host/words.txt?token=secret"
    settings = ["train.max_steps=2", "sample.length=0", f"data.source={address}", "tracking.tracker=wandb"]
    config = tiny_config(tmp_path, settings)
    for _ in range(2):
        run(config, config_name="tiny", resume=True)
    assert [tracker for tracker, _ in opened] == ["wandb", "none"]
    assert "secret" not in repr(opened)
    written = [path for path in Path("run").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"secret" in path.read_bytes()]
    longer = tiny_config(tmp_path, [*settings, "train.max_steps=3"])
    run(longer, config_name="tiny", resume=True)
    assert [tracker for tracker, _ in opened] == ["wandb", "none", "wandb"]


def test_ids_changed_in_place_are_noticed(tmp_path):
    config = tiny_config(tmp_path)
    prepare(config.data)
    [file] = (tmp_path / "data" / "prepared").glob("*/ids.bin")
    content = bytearray(file.read_bytes())
    content[3000] = 200
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=r"ids\.bin is damaged: it has id 200, and the vocabulary \d+ symbols"):
        prepare(config.data)


@pytest.mark.parametrize("table", [None, np.arange(5)])
def test_every_batch_is_checked(table):
    import torch

    source = IdSource(np.array([0, 1, 2, 9, 4] * 20, np.uint8), torch.device("cpu"), table, 5)
    assert source.windows(np.array([0]), 3).tolist() == [[0, 1, 2]]
    with pytest.raises(CorpusError, match="has id 9"):
        source.windows(np.array([0]), 4)
