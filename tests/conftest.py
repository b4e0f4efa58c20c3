"""What every test stands on: one thread for torch, no tracker or mirror of the machine's own, small engines."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from loopback import Site, serve
from tiny_models import write_model

from charrnn.log import configure_logging
from charrnn.vocab import Vocab
from infer import Engine

if TYPE_CHECKING:
    from train.loop.trainer import Trainer

# A shared machine's pauses are no failure of an example.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_configure() -> None:
    # Tiny tensors gain nothing from threads, and lose much to them when the cores are busy.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHARRNN_DATA_MIRROR", "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    configure_logging()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server on loopback."""
    with serve() as site:
        yield site


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["GRU", "LSTM"])
def engine(request: pytest.FixtureRequest, model_folder: Path) -> Engine:
    return Engine(write_model(model_folder / f"{request.param}.onnx", rnn=request.param))


@pytest.fixture(scope="module")
def gru(model_folder: Path) -> Engine:
    return Engine(write_model(model_folder / "gru.onnx"))


@pytest.fixture(scope="module")
def byte_engine(model_folder: Path) -> Engine:
    return Engine(write_model(model_folder / "bytes.onnx", Vocab.of_bytes()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> "Trainer":
    """A finished run of an LSTM."""
    from training import make_trainer, tiny_config

    trainer = make_trainer(tiny_config(tmp_path_factory.mktemp("run"), ["model.rnn=LSTM"]))
    trainer.fit()
    return trainer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory, where mounting one is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, on Linux")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
