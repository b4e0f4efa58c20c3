"""What torchrun starts for test_collectives: two processes that run all scenarios, one after another.

`torchrun --nproc_per_node=2 collectives_worker.py FOLDER` writes FOLDER/rank-<rank>.json: scenario -> what it saw
there. How it ended is in "error", the kind of exception or null, and "text". The texts in FOLDER are prepared before.
"""

import contextlib
import errno
import faulthandler
import functools
import json
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from training import ListRecorder, make_rank, some_text, tiny_config

from charrnn.config import RunConfig
from charrnn.data.corpus import prepare
from charrnn.errors import CheckpointError, ConfigError, CorpusError
from charrnn.windows import Batch
from train.checkpoint.format import load_newest, step_folders
from train.distributed.collectives import Collectives
from train.distributed.setup import check_processes, make_accelerator
from train.distributed.signals import StopSignals
from train.distributed.watchdog import Watchdog, connect_store
from train.loop.trainer import Trainer
from train.main import leave
from train.run import find_start

RANK = int(os.environ.get("RANK", "0"))
HUNG_S = 200  # a worker that has not ended by then prints all its stacks and dies
SPOILT = 4  # the update in which a fault is injected
# A gradient of several buckets of 1 MiB.
LARGE = ("model.hidden_dim=256", "model.embedding_dim=64", "train.max_steps=20", "eval.every=0", "checkpoint.every=0")

SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {}


def scenario(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def prepare_texts(folder: Path) -> None:
    """Writes the texts and their ids: once, ahead of all processes."""
    prepare(config_of(folder, "none").data)
    (folder / "other.txt").write_text(some_text(seed=1), encoding="utf-8")
    prepare(config_of(folder, "none", f"data.source={folder / 'other.txt'}").data)


def config_of(folder: Path, name: str, *settings: str) -> RunConfig:
    return tiny_config(folder, [*settings, "sample.length=4", f"train.run_dir={folder / 'runs' / name}"])


def ranks() -> Collectives:
    return Collectives(make_accelerator(RunConfig().train))


def raised(action: Callable[[], Any]) -> dict[str, Any]:
    """The error that `action` ends with on this rank."""
    try:
        action()
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None, "text": ""}


def outcome(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `action` returns, and the error that it ends with: on all ranks alike, or the rest would wait for ever."""
    figures: dict[str, Any] = {}
    return raised(lambda: figures.update(action())) | figures


def crc(tensors: Sequence[Tensor]) -> int:
    return zlib.crc32(b"".join(t.detach().numpy().tobytes() for t in tensors))


def weights(trainer: Trainer) -> int:
    return crc_of_named(trainer.model.state_dict())


def crc_of_named(tensors: dict[str, Tensor]) -> int:
    return crc([tensors[name] for name in sorted(tensors)])


def moments(trainer: Trainer) -> int:
    states = trainer.update.optimizer.state.values()
    return crc([state[name] for state in states for name in ("exp_avg", "exp_avg_sq", "step")])


def evaluations(trainer: Trainer) -> list[list[float]]:
    return [[r["step"], r["val/stream/loss"]] for r in trainer.recorder.records if "val/stream/loss" in r]


def losses(trainer: Trainer) -> list[float]:
    return list(trainer.recorder.losses().values())


def saved_steps(config: RunConfig) -> list[int]:
    """The steps of the run's checkpoints, newest first; of the newest, only if it is whole."""
    run_dir = Path(config.train.run_dir)
    steps = [int(folder.name.removeprefix("step-")) for folder in step_folders(run_dir)]
    newest = load_newest(run_dir) if steps else None
    assert (newest.step if newest else None) == (steps[0] if steps else None)
    return steps


def fit_with_fault(config: RunConfig, inject: Callable[[Trainer], Any], recorder: ListRecorder | None = None) -> dict:
    """How training ends on this rank after `inject`, and what is on the disk then."""
    trainer = make_rank(config, recorder)
    inject(trainer)
    figures = raised(trainer.fit)
    trainer.control.collectives.barrier()  # the other rank came out of it too
    return figures | {"step": trainer.progress.step, "losses": losses(trainer), "saved": saved_steps(config)}


# What ranks tell each other


@scenario
def exchange(folder: Path) -> dict[str, Any]:
    def agreed(stop: int = 0, fault: bool = False, batch: Sequence[int] = (1, 2)) -> dict[str, Any]:
        return vars(here.all_gather_status(stop, fault, 100.25 + RANK, np.array(batch)))

    here = ranks()
    return {
        "count": here.world_size,
        "is_main": here.is_main,
        "nothing": agreed(),
        "stop on 1": agreed(stop=15 * RANK),
        "stops on both": agreed(stop=10 + RANK),
        "fault on 1": agreed(fault=RANK == 1),
        "faults on both": agreed(fault=True),
        "odd batch": agreed(batch=(1, 2 + RANK)),
        "same windows, other order": agreed(batch=(1, 2) if RANK else (2, 1)),
    }


@scenario
def gather(folder: Path) -> dict[str, Any]:
    here = ranks()
    return {"values": here.all_gather({"rank": RANK, "nested": [RANK] * (RANK + 1)}), "none": here.all_gather(None)}


@scenario
def together(folder: Path) -> dict[str, Any]:
    here = ranks()

    def fail_on(*failing: int) -> Callable[[], int]:
        def action() -> int:
            if RANK in failing:
                raise (CheckpointError if RANK else ConfigError)(f"of {RANK}")
            return 10 + RANK

        return action

    return {
        "none": here.run_on_all(fail_on()),
        "on 1": raised(lambda: here.run_on_all(fail_on(1))),
        "on 0": raised(lambda: here.run_on_all(fail_on(0))),
        "on both": raised(lambda: here.run_on_all(fail_on(0, 1))),
        "after": here.all_gather(RANK),
    }


@scenario
def locally_first(folder: Path) -> dict[str, Any]:
    here, done = ranks(), folder / "done"

    def prepare_once() -> str:
        if done.exists():
            return "found"
        done.write_text("x")
        return "made"

    def fail_on(failing: int) -> Callable[[], None]:
        def action() -> None:
            if failing == RANK:
                raise CorpusError(f"of {RANK}")
            (folder / f"ran-on-{RANK}-beside-{failing}").touch()

        return action

    return {
        "result": here.local_main_first(prepare_once),
        "on 0": raised(lambda: here.local_main_first(fail_on(0))),
        "on 1": raised(lambda: here.local_main_first(fail_on(1))),
        "ran": sorted(path.name for path in folder.glob("ran-on-*")),
    }


@scenario
def store(folder: Path) -> dict[str, Any]:
    """A watchdog on the launcher's own store."""
    here = ranks()
    dog = Watchdog(connect_store(30.0, "dog"), RANK, 2, 30.0)
    here.barrier()
    both = dog.check_peers()
    here.barrier()
    if RANK == 1:
        dog.sign_off()
    here.barrier()
    return {"both": both, "one": dog.check_peers(), "line of 1": dog._peers[1].line}


@scenario
def processes(folder: Path) -> dict[str, Any]:
    count = ranks().world_size
    config = config_of(folder, "none", "train.processes=3")
    return {
        "wrong": raised(lambda: check_processes(config, count)),
        "right": raised(lambda: check_processes(config_of(folder, "none", "train.processes=2"), count)),
    }


# Where they start


@scenario
def different_steps(folder: Path) -> dict[str, Any]:
    """Run folders on disks of their own: process 0 finds a checkpoint there, process 1 none."""
    name = f"apart-{RANK}"
    config = config_of(folder, name, "train.max_steps=3", "checkpoint.every=0", "eval.every=0")
    trainer = make_rank(config)
    trainer.fit()
    here, run_dir = ranks(), Path(config.train.run_dir)
    return raised(lambda: find_start(config, prepare(config.data), run_dir, here, resume=True))


@scenario
def different_texts(folder: Path) -> dict[str, Any]:
    source = [f"data.source={folder / 'other.txt'}"] if RANK else []
    config = config_of(folder, "texts", *source)
    here, run_dir = ranks(), Path(config.train.run_dir)
    return raised(lambda: find_start(config, prepare(config.data), run_dir, here, resume=True))


@scenario
def damaged_on_one(folder: Path) -> dict[str, Any]:
    """Process 1 finds nothing but damaged checkpoints in a run folder of its own."""
    config = config_of(folder, "damaged-on-1")
    here, run_dir = ranks(), Path(config.train.run_dir)
    if RANK == 1:
        (run_dir / "step-00000005").mkdir(parents=True)
    else:
        run_dir = folder / "runs" / "absent"
    return raised(lambda: find_start(config, prepare(config.data), run_dir, here, resume=True))


# Faults of one rank


def spoil_loss(value: float) -> Callable[[Trainer], None]:
    """Multiplies process 1's loss of update SPOILT."""

    def inject(trainer: Trainer) -> None:
        def spoil(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
            if trainer.progress.step != SPOILT - 1 or not module.training:
                return None
            return output[0] * value, output[1]

        if RANK == 1:
            trainer.accelerator.unwrap_model(trainer.update.loss_module).register_forward_hook(spoil)

    return inject


@scenario
def nan_loss(folder: Path) -> dict[str, Any]:
    return fit_with_fault(config_of(folder, "nan", "checkpoint.every=2"), spoil_loss(float("nan")))


@scenario
def inf_loss(folder: Path) -> dict[str, Any]:
    return fit_with_fault(config_of(folder, "inf", "checkpoint.every=2"), spoil_loss(float("inf")))


@scenario
def nan_loss_seen_late(folder: Path) -> dict[str, Any]:
    """Figures come to the host every five updates."""
    config = config_of(folder, "nan-late", "log.every=5", "eval.every=0", "checkpoint.every=0")
    return fit_with_fault(config, spoil_loss(float("nan")))


def change_batch(change: Callable[[Batch], Batch]) -> Callable[[Trainer], None]:
    """Changes the windows that process 1 takes update SPOILT to be made of."""

    def inject(trainer: Trainer) -> None:
        batch = trainer.data.plan.batch

        def changed(step: int) -> Batch:
            return change(batch(step)) if step == SPOILT - 1 else batch(step)

        if RANK == 1:
            object.__setattr__(trainer.data.plan, "batch", changed)

    return inject


@scenario
def index_outside_the_text(folder: Path) -> dict[str, Any]:
    config = config_of(folder, "outside", "checkpoint.every=2")
    return fit_with_fault(config, change_batch(lambda b: Batch(b.starts + 10**9, b.reset)))


@scenario
def other_windows(folder: Path) -> dict[str, Any]:
    def other(batch: Batch) -> Batch:
        starts = batch.starts.copy()
        starts[0] += 1  # a window of process 0's, which process 1 never reads
        return Batch(starts, batch.reset)

    return fit_with_fault(config_of(folder, "other", "checkpoint.every=2"), change_batch(other))


@scenario
def disk_full_on_0(folder: Path) -> dict[str, Any]:
    """From update SPOILT on."""
    config = config_of(folder, "full", "checkpoint.every=3", "eval.every=0", "train.max_steps=200")

    def fill(trainer: Trainer) -> None:
        fsync, step = os.fsync, trainer.train_step

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def filling() -> None:
            if trainer.progress.step == SPOILT - 1:
                trainer.checkpoints.wait()
                if RANK == 0:
                    os.fsync = refuse
            step()

        trainer.train_step = filling  # type: ignore[method-assign]
        undo.callback(setattr, os, "fsync", fsync)

    with contextlib.ExitStack() as undo:
        return fit_with_fault(config, fill)


@scenario
def record_refused_on_0(folder: Path) -> dict[str, Any]:
    """As metrics.jsonl on a full disk."""

    class Refusing(ListRecorder):
        def record(self, values: dict[str, Any]) -> None:
            if RANK == 0 and values["step"] == SPOILT:
                raise CheckpointError("cannot write metrics.jsonl")
            super().record(values)

    return fit_with_fault(config_of(folder, "refused", "checkpoint.every=2"), lambda trainer: None, Refusing())


# Stops


@contextlib.contextmanager
def signalled(trainer: Trainer, number: int) -> Iterator[None]:
    """Sends this process a signal ahead of update SPOILT, and goes on when it is noted."""
    noted, step = threading.Event(), trainer.train_step
    trainer.control.signals = StopSignals(noted.set)

    def stepping() -> None:
        step()
        if trainer.progress.step == SPOILT and not noted.is_set():
            os.kill(os.getpid(), number)
            assert noted.wait(60)

    trainer.train_step = stepping  # type: ignore[method-assign]
    with trainer.control.signals.handled():
        yield


@scenario
def stop_on_1(folder: Path) -> dict[str, Any]:
    settings = ("data.windows=carry", "model.dropout=0.2", "eval.every=5")
    config = config_of(folder, "stopped", *settings)
    first = make_rank(config)
    with signalled(first, signal.SIGUSR1) if RANK == 1 else contextlib.nullcontext():
        first.fit()
    figures = {"stopped_by": first.control.stopped_by, "step": first.progress.step, "saved": saved_steps(config)}
    first.control.collectives.barrier()

    second = make_rank(config)
    figures["resumed_at"] = second.progress.step
    second.fit()
    whole = make_rank(config_of(folder, "not-stopped", *settings))
    whole.fit()
    return figures | {
        "curve": losses(first) + losses(second),
        "whole_curve": losses(whole),
        "weights": [weights(second), moments(second)],
        "whole_weights": [weights(whole), moments(whole)],
    }


# How gradients cross


def ddp_figures(trainer: Trainer) -> dict[str, Any]:
    module = trainer.update.loss_module
    return {
        "bucket_mib": module.bucket_bytes_cap / 2**20,
        "hooks": [hook.__name__ for hook, _ in module._comm_hooks],
        "views": module.gradient_as_bucket_view,
    }


@scenario
def gradients(folder: Path) -> dict[str, Any]:
    kinds = {
        "plain": (),
        "bucket_mb=1": ("train.bucket_mb=1",),
        "bf16": ("train.grad_compression=bf16",),
        "fp16": ("train.grad_compression=fp16",),
        "accumulated": ("train.accumulation_steps=2",),
    }

    def train(name: str) -> dict[str, Any]:
        trainer = make_rank(config_of(folder, f"gradients-{name}", *LARGE, *kinds[name]))
        trainer.fit()
        trainer.control.collectives.barrier()
        return {
            **ddp_figures(trainer),
            "gradient_mib": trainer.model.num_parameters() * 4 / 2**20,
            "losses": losses(trainer),
            "weights": weights(trainer),
        }

    return {name: outcome(functools.partial(train, name)) for name in kinds}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    figures = {}
    for name, play in SCENARIOS.items():
        print(f"{RANK}: {name}", file=sys.stderr, flush=True)
        figures[name] = outcome(functools.partial(play, folder))
    (folder / f"rank-{RANK}.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
