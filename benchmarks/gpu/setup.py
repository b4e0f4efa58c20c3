"""What the checks share: the device, a text, configs at two sizes, trainers in this process."""

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import ROOT
from benchmarks.training import make_trainer
from charrnn.config import RunConfig, load_config
from train.loop.cuda_graph import DirectCapture, GraphedStep
from train.loop.trainer import Trainer
from train.tracking.recorder import Recorder

_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "two", "owls", "watch\n"]
# Small carried batches; on a CPU tiny ones.
_SMALL = {"data.windows": "carry", "data.batch_size": 16, "data.seq_len": 48, "data.reset": 0.05}
_SMALL |= {"model.embedding_dim": 32, "model.hidden_dim": 64, "optim.warmup_steps": 5, "train.mixed_precision": "no"}
TINY = {"data.batch_size": 8, "data.seq_len": 16, "model.embedding_dim": 8, "model.hidden_dim": 16}
# Steps alone: no end, evaluations, checkpoints or samples.
_STEPS = {"train.epochs": 0, "train.max_steps": 10**6, "train.time_limit": 0, "train.cuda_graph": False}
_STEPS |= {"eval.every": 0, "checkpoint.every": 0, "sample.length": 0, "log.every": 1}


class ListRecorder(Recorder):
    """Keep the records in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []

    def record(self, values: dict[str, Any]) -> None:
        """Append one record."""
        self.records.append(values)


@dataclass(frozen=True)
class Setup:
    """Where checks run, and how large they are.

    Attributes:
        text: A file, or the name of a corpus.
        work: Folder for prepared corpora and runs.
        on_gpu: Whether there is a CUDA device; without, everything is tiny.
    """

    text: str
    work: Path
    on_gpu: bool

    @property
    def device(self) -> torch.device:
        """The device under test."""
        return torch.device("cuda" if self.on_gpu else "cpu")

    def size(self, full: int, tiny: int) -> int:
        """A number of steps, rows or units."""
        return full if self.on_gpu else tiny

    @property
    def precisions(self) -> tuple[str, ...]:
        """Values of train.mixed_precision that the device takes."""
        return ("no", "bf16", "fp16") if self.on_gpu else ("no", "bf16")

    def config(self, name: str = "", **options: Any) -> RunConfig:
        """A config without evaluations, checkpoints and samples.

        Args:
            name: Of a file in configs/; empty for small carried batches.
            options: Fields as section__key.
        """
        fields: dict[str, Any] = {"data.source": self.text, "data.cache_dir": str(self.work / "data"), **_STEPS}
        fields |= {"train.threads": self.size(0, 1)}
        fields |= ({} if name else _SMALL) if self.on_gpu else _SMALL | TINY
        return load_config(ROOT / "configs" / name if name else None, fields | by_field(options))

    def trainer(
        self, config: RunConfig, *, cpu: bool = False, graph: bool = False, run_dir: Path | None = None
    ) -> Trainer:
        """A trainer in this process.

        Args:
            config: The run's.
            cpu: Train on the CPU.
            graph: Replay the step as a CUDA graph; on a CPU run it over the same static buffers.
            run_dir: Of a run to resume; an empty folder otherwise.
        """
        if run_dir is None:
            run_dir = self.work / "run"
            shutil.rmtree(run_dir, ignore_errors=True)
        config = self.with_train(config, run_dir=str(run_dir), cuda_graph=graph and self.on_gpu)
        with patch.dict(os.environ, ACCELERATE_USE_CPU=str(cpu or not self.on_gpu).lower()):
            trainer = make_trainer(config, ListRecorder())
        assert (trainer.accelerator.device.type == "cuda") == (self.on_gpu and not cpu)
        if graph and not self.on_gpu:
            replay_without_gpu(trainer)
        assert (trainer.update.graphed is not None) == graph
        return trainer

    def losses(self, config: RunConfig, steps: int, **options: Any) -> list[float]:
        """The training losses of a new trainer's first steps. options: of `trainer`."""
        return train(self.trainer(config, **options), steps)

    @staticmethod
    def with_train(config: RunConfig, **fields: object) -> RunConfig:
        """The config with other fields of its section train."""
        return config.model_copy(update={"train": config.train.model_copy(update=fields)})


def by_field(options: dict[str, Any]) -> dict[str, Any]:
    """Python's section__key to section.key."""
    return {name.replace("__", "."): value for name, value in options.items()}


def replay_without_gpu(trainer: Trainer) -> None:
    """Have the trainer run its step over static buffers, as one does whose step is captured."""
    update, seq_len = trainer.update, trainer.config.data.seq_len
    update.graphed = GraphedStep(update.compute, update.optimizer, update.state, seq_len, DirectCapture())


def train(trainer: Trainer, steps: int) -> list[float]:
    """Make `steps` training steps as `fit` does, without evaluations; returns the losses recorded so far."""
    for _ in range(steps):
        trainer.next_step()
        trainer.train_step()
        if trainer.schedule.log_due():
            trainer.log()
    assert isinstance(trainer.recorder, ListRecorder)
    return [r["train/loss"] for r in trainer.recorder.records if "train/loss" in r]


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Of two curves of one length."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def allow_tf32(allowed: bool) -> None:
    """Let cuDNN and cuBLAS round the factors of fp32 products to TF32, or forbid it."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def tiny_text(folder: Path) -> Path:
    """Words in a random order, 40,000 characters."""
    draw = random.Random(0)
    path = folder / "words.txt"
    path.write_text(" ".join(draw.choice(_WORDS) for _ in range(10_000))[:40_000])
    return path
