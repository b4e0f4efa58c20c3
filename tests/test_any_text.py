"""The README's command on texts of a few KB and up, and beside a busy process, as a user runs it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.training import last_metrics
from charrnn.data.stats import ngram_loss

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

RUSSIAN = "и в не он на я что тот быть с весь это как она по но мы ты из у который то за свой ещё бы мой".split()  # noqa: SIM905


def english(size):
    """`size` characters of the prose of this project's own guides, without code and tables."""
    guides = sorted((ROOT / "docs").glob("*.md"), key=lambda path: (path.stem != "how-it-works", path))
    guides += sorted(ROOT.glob("*.md"))
    pages = [re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S) for path in guides]
    text = "\n".join(line for page in pages for line in page.splitlines() if not line.lstrip().startswith("|"))
    assert len(text) >= size
    return text[:size]


def russian(size):
    """Words in an order that a model can learn: each follows one of three others."""
    draw = np.random.default_rng(0)
    words, place = [], 0
    for _ in range(size // 3):
        place = (3 * place + int(draw.integers(3))) % len(RUSSIAN)
        words.append(RUSSIAN[place])
    return " ".join(words)[:size]


def trained(folder, text, *options):
    """The losses and messages of `python train/main.py` on a text, and the seconds it took."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--data", "text.txt", *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=280, env={**environment, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return last_metrics(folder / "checkpoints" / "text"), done.stderr, time.monotonic() - began


def counted(text):
    """The loss of counting n-grams on the last tenth."""
    symbols = sorted(set(text))
    ids = np.array([symbols.index(c) for c in text], np.uint16)
    cut = int(len(ids) * 0.9)
    return ngram_loss(ids[:cut], ids[cut:], len(symbols))


@pytest.mark.parametrize("size", [5_000, 20_000, 100_000])
def test_english_of_any_size_is_learnt_better_than_by_counting(tmp_path, size):
    text = english(size)
    metrics, messages, _ = trained(tmp_path, text, "--time-limit", "60s")
    assert metrics["val/stream/loss"] < counted(text)
    assert "fine-tune the base model" in messages
    assert "mixed_precision: native\n" in (tmp_path / "checkpoints" / "text" / "config.yaml").read_text()
    assert "is worse than the n-gram baseline" not in messages
    assert len([line for line in messages.splitlines() if "  validation  " in line]) >= 10


def test_another_script_is_learnt_from_scratch(tmp_path):
    text = russian(50_000)
    metrics, messages, _ = trained(tmp_path, text, "--time-limit", "40s")
    assert "fine-tune" not in messages
    assert metrics["val/stream/loss"] < 1.1 * counted(text)


def test_too_short_a_run_warns_that_counting_is_better(tmp_path):
    _, messages, _ = trained(tmp_path, english(100_000), "--init-from", "none", "--max-steps", "5")
    assert "is worse than the n-gram baseline of" in messages
    assert "--init-from base" in messages


def test_a_time_limit_holds_beside_a_busy_process(tmp_path):
    spinning = [sys.executable, "-c", "import os\nwhile os.getppid() == " + str(os.getpid()) + ": pass"]
    busy = [subprocess.Popen(spinning) for _ in range(max(1, (os.cpu_count() or 2) - 1))]
    try:
        metrics, messages, seconds = trained(tmp_path, english(100_000), "--time-limit", "15s")
    finally:
        for process in busy:
            process.kill()
    assert "other processes use these cores" in messages
    assert seconds < 90
    assert metrics["step"] > 30
