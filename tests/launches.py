"""Processes that tests start on this machine's CPU: the launcher's arguments, a small run, and its log."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training import some_text

from benchmarks.common import free_port
from benchmarks.training import read_metrics

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


def torchrun(processes: int) -> list[str]:
    """Returns Python's arguments: `accelerate launch --cpu --num_processes 2` starts one process (accelerate#2741)."""
    return ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]


def python(*arguments: str | Path, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with arguments in `folder`, on this project's sources; returns its exit code, stdout and stderr."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=given)


def ended_well(arguments: Sequence[str | Path], folder: Path, use_cpu: str = "true") -> str:
    """Runs Python with arguments in `folder`, which must exit with 0; returns stdout and stderr together."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": use_cpu, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=folder, env=environment,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=280)
    finally:
        process.terminate()  # a launcher takes its processes with it
    assert process.returncode == 0, output
    return output


def prepare_small_run(folder: Path) -> None:
    """words.txt and small.yaml."""
    (folder / "words.txt").write_text(some_text(), encoding="utf-8")
    (folder / "small.yaml").write_text(SMALL)


def train_small(folder: Path, processes: int, *arguments: str) -> str:
    """train/main.py on `prepare_small_run`'s files, by torchrun; returns what it prints."""
    run = [ROOT / "train" / "main.py", "--config", "small.yaml", "--data", "words.txt", *arguments]
    return ended_well([*torchrun(processes), *run], folder, use_cpu="false")  # the trainer joins them by itself


def logged(run_dir: Path, name: str = "train/loss") -> dict[int, float]:
    """Returns step -> the value of that name in metrics.jsonl."""
    return {r["step"]: r[name] for r in read_metrics(run_dir) if name in r}
