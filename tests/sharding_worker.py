"""What torchrun starts for test_sharding: all runs of this many processes, one after another, into a JSON file a rank.

`torchrun ... sharding_worker.py FOLDER` writes FOLDER/world-<processes>-rank-<rank>.json: run name -> figures. Without
torchrun it is a single process. FOLDER's texts are prepared before (`prepare_texts`): the processes start at once.
"""

import contextlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import ListRecorder, logged, make_rank, some_text, tiny_config

from charrnn.config import RunConfig
from charrnn.data.corpus import prepare
from train.loop.trainer import Trainer
from train.main import leave

CELLS = ("GRU", "LSTM")
MODES = ("sliding", "carry")
WORLDS = (2, 4, 1)  # in the order in which they are launched: later ones go on from what earlier ones left
STEPS, HALF, BATCH = 50, 25, 12
TEXT_CHARS = 3200  # an epoch of 29 updates: segments end within one
# Rows that 2 and 4 processes share unevenly: 3 lanes; 4 windows, and a shorter one.
UNEVEN_EVALUATION = (
    *("eval.stream_lanes=3", "eval.stream_warmup=8", "eval.window=70", "eval.batch_rows=4"),
    f"eval.every={HALF}",
)
DROPOUT = "model.dropout=0.3"
RESETS = {"sliding": (), "carry": ("data.reset=0.2",)}
# Gradients of more than one bucket. A rank's windows, a byte a character, are larger than SMALL with 4 processes too.
# An evaluation, and a better `best/`, come once between two updates and once at the end.
TRAFFIC_STEPS = 3
TRAFFIC = (
    *("data.batch_size=32", "data.seq_len=128", "data.windows=carry", "model.hidden_dim=300", "model.num_layers=1"),
    *(f"train.max_steps={TRAFFIC_STEPS}", f"eval.every={TRAFFIC_STEPS - 1}", "train.bucket_mb=1"),
)
TRAFFIC_RUNS = {
    "plain": ("train.accumulation_steps=1",),
    "accumulated": ("train.accumulation_steps=4",),
    "compressed": ("train.accumulation_steps=4", "train.grad_compression=fp16"),
}
SMALL = 1024  # bytes


@dataclass(frozen=True)
class Segment:
    """One call of the trainer. name: unique in a launch. run: its run folder; where it holds a run, that goes on."""

    name: str
    run: str
    settings: tuple[str, ...]
    steps: int = STEPS


def accumulation_splits(world: int) -> list[int]:
    """All numbers of micro-batches that a process's share of the batch divides into."""
    return [parts for parts in range(1, BATCH + 1) if BATCH % (world * parts) == 0]


def segments(world: int) -> Iterator[Segment]:
    """What a launch of `world` processes trains."""
    for cell, mode in itertools.product(CELLS, MODES):
        kind = (f"model.rnn={cell}", f"data.windows={mode}", *RESETS[mode], *UNEVEN_EVALUATION)
        for parts in accumulation_splits(world):
            name = f"{cell}-{mode}-{parts}"
            yield Segment(name, f"{name}-by-{world}", (*kind, f"train.accumulation_steps={parts}"))
        # The rate must not depend on where a segment ends.
        yield from _resumed(world, f"{cell}-{mode}", (*kind, "optim.schedule=constant"))
    yield from _with_dropout(world)


def _resumed(world: int, name: str, settings: tuple[str, ...]) -> Iterator[Segment]:
    """Two runs in two segments each, by 2 then 4 processes and by 4 then 1, and the uninterrupted run of 1."""
    if world == 2:
        yield Segment(f"{name}-begun", f"{name}-2-then-4", settings, HALF)
    elif world == 4:
        yield Segment(f"{name}-resumed", f"{name}-2-then-4", settings)
        yield Segment(f"{name}-begun", f"{name}-4-then-1", settings, HALF)
    else:
        yield Segment(f"{name}-resumed", f"{name}-4-then-1", settings)
        yield Segment(f"{name}-whole", f"{name}-whole", settings)


def _with_dropout(world: int) -> Iterator[Segment]:
    """Uninterrupted; in two segments of 2 processes; and by 2 then 4."""
    settings = ("data.windows=carry", "optim.schedule=constant", DROPOUT)
    if world == 2:
        yield Segment("dropout-whole", "dropout-whole", settings)
        yield Segment("dropout-begun", "dropout-2-then-2", settings, HALF)
        yield Segment("dropout-resumed", "dropout-2-then-2", settings)
        yield Segment("dropout-begun-for-4", "dropout-2-then-4", settings, HALF)
    elif world == 4:
        yield Segment("dropout-resumed", "dropout-2-then-4", settings)


def run_config(folder: Path, settings: Iterable[str], run: str) -> RunConfig:
    """A tiny run of FOLDER's text."""
    common = (f"data.batch_size={BATCH}", "data.seq_len=8", "optim.lr=0.02", "checkpoint.every=0", "sample.length=4")
    assignments = [*common, *settings, f"train.run_dir={folder / 'runs' / run}"]
    return tiny_config(folder, assignments, some_text(TEXT_CHARS))


def traffic_folder(folder: Path) -> Path:
    return folder / "traffic"


def prepare_texts(folder: Path) -> None:
    """Writes the texts and their ids: once, ahead of all processes."""
    prepare(run_config(folder, (), "none").data)
    traffic_folder(folder).mkdir()
    (traffic_folder(folder) / "words.txt").write_text(some_text(15_000), encoding="utf-8")
    prepare(run_config(traffic_folder(folder), (), "none").data)


@contextlib.contextmanager
def watched(trainer: Trainer) -> Iterator[list[list[int]]]:
    """Notes where the windows begin of each batch that the trainer reads while the block runs."""
    starts: list[list[int]] = []
    read = trainer.data.train.windows

    def noting(at: Any, length: int) -> Tensor:
        starts.append(at.tolist())
        return read(at, length)

    trainer.data.train.windows = noting
    try:
        yield starts
    finally:
        del trainer.data.train.windows


class Traffic(TorchDispatchMode):
    """Notes every collective of this thread, DDP's in C++ too: all pass torch's dispatcher on their way to gloo.

    messages: (phase, updates made before, operation, element type, bytes of all tensors that it reads or writes).
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.messages: list[tuple[str, int, str, str, int]] = []
        self._trainer, self._phase = trainer, "loop"
        for name in ("train_step", "log", "evaluate", "save"):
            setattr(trainer, name, self._noting(name, getattr(trainer, name)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            size = sum(tensor.nbytes for tensor in tensors)
            kinds = "+".join(sorted({str(tensor.dtype) for tensor in tensors}))
            self.messages.append((self._phase, self._trainer.progress.step, func.__name__, kinds, size))
        return func(*args, **(kwargs or {}))

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            before, self._phase = self._phase, name
            try:
                return method(*args, **kwargs)
            finally:
                self._phase = before

        return noting


def train_segment(folder: Path, segment: Segment) -> dict[str, Any]:
    """Trains it, and returns what this process saw of it."""
    config = run_config(folder, (*segment.settings, f"train.max_steps={segment.steps}"), segment.run)
    recorder = ListRecorder()
    with logged() as messages:
        trainer = make_rank(config, recorder)
    figures: dict[str, Any] = {
        "processes": trainer.accelerator.num_processes,
        "first_step": trainer.progress.step + 1,
        "generator": zlib.crc32(torch.get_rng_state().numpy().tobytes()),
        "state_before": as_lists(trainer.update.state),
    }
    with watched(trainer) as starts:
        trainer.fit()
    trainer.accelerator.wait_for_everyone()  # the last checkpoint is rank 0's work
    return figures | {
        "loss": list(recorder.losses().values()),
        "grad_norm": [r["train/grad_norm"] for r in recorder.records if "train/grad_norm" in r],
        "stream": [r["val/stream/loss"] for r in recorder.records if "val/stream/loss" in r],
        "windows": [r["val/windows/loss"] for r in recorder.records if "val/windows/loss" in r],
        "messages": messages,
        "state_after": as_lists(trainer.update.state),
        "weights": zlib.crc32(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())),
        "starts": starts,
    }


def as_lists(state: Sequence[Tensor]) -> list[Any]:
    """The state with its rows first: for each row, for each part, (L, H)."""
    return torch.stack(list(state)).permute(2, 0, 1, 3).tolist()  # (B / world, parts, L, H)


def count_traffic(folder: Path, name: str, world: int) -> dict[str, Any]:
    """The messages of a few updates and of all that comes between them, and the sizes of what need not cross."""
    config = run_config(folder, (*TRAFFIC, *TRAFFIC_RUNS[name]), f"{name}-by-{world}")
    trainer = make_rank(config, ListRecorder())
    with Traffic(trainer) as traffic:
        trainer.fit()
    trainer.accelerator.wait_for_everyone()
    rows = trainer.data.rows.stop - trainer.data.rows.start
    return {
        "messages": traffic.messages,
        "parameters": trainer.model.num_parameters(),
        "window_chars": rows * (config.data.seq_len + 1),
        "state_bytes": sum(part.nbytes for part in trainer.update.state),
    }


def main(folder: Path) -> None:
    """Trains all that is to be trained by this number of processes."""
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    figures = {segment.name: train_segment(folder, segment) for segment in segments(world)}
    figures |= {f"traffic-{name}": count_traffic(traffic_folder(folder), name, world) for name in TRAFFIC_RUNS}
    (folder / f"world-{world}-rank-{rank}.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
