"""Two CPU processes are one run: the same windows, the same losses, the same evaluation, one record."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training import some_text

ROOT = Path(__file__).parent.parent
SMALL = """
data: {batch_size: 8, seq_len: 16}
model: {embedding_dim: 8, hidden_dim: 16}
train: {epochs: 0, max_steps: 12, threads: 1}
eval: {every: 6, stream_lanes: 4, stream_warmup: 32}
log: {every: 1}
checkpoint: {every: 5}
sample: {length: 20, prompt: "the "}
"""


def launch(folder, processes, *arguments):
    """torchrun on the CPU: `accelerate launch --cpu --num_processes 2` starts one process (accelerate#2741)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [
        f"--master_port={port}",
        str(ROOT / "train" / "main.py"),
        "--config",
        "small.yaml",
        "--data",
        "words.txt",
    ]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def figures(folder, run, name):
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[name] for r in map(json.loads, lines) if name in r}


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["sliding", "carry"])
def test_two_processes_give_the_curve_of_one_and_either_can_go_on_from_the_other(tmp_path, windows):
    (tmp_path / "words.txt").write_text(some_text(), encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL)
    settings = ["--set", f"data.windows={windows}"]
    one = launch(tmp_path, 1, "--run-dir", "one", *settings)
    two = launch(tmp_path, 2, "--run-dir", "two", *settings)
    assert "1 process(es) x 1" in one
    assert "2 process(es) x 1" in two
    for name in ("train/loss", "train/grad_norm", "val/stream/loss", "val/windows/loss"):
        curve = figures(tmp_path, "one", name)
        assert len(curve) == (12 if name.startswith("train") else 2)
        assert figures(tmp_path, "two", name) == pytest.approx(curve, rel=1e-5)

    longer = launch(tmp_path, 1, "--run-dir", "one", "--max-steps", "16", *settings)
    fewer = launch(tmp_path, 1, "--run-dir", "two", "--max-steps", "16", *settings)
    assert "resumed at step 12" in longer
    assert "2 process(es) before, 1 now" in fewer
    curve = figures(tmp_path, "one", "train/loss")
    assert sorted(curve) == list(range(1, 17))
    assert figures(tmp_path, "two", "train/loss") == pytest.approx(curve, rel=1e-5)
