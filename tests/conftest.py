"""What every test stands on: one thread for torch, and no tracker or mirror of the machine's own."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure() -> None:
    # Tiny tensors gain nothing from threads, and lose much to them when the cores are busy.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHARRNN_DATA_MIRROR", "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
