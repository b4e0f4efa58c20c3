"""What torchrun starts for test_collectives: two processes that play all scenarios, one after another.

`torchrun --nproc_per_node=2 collectives_worker.py FOLDER` writes FOLDER/rank-<rank>.json: scenario -> the traceback of
what does not hold on that rank, or "". The texts in FOLDER are prepared before.
"""

import contextlib
import errno
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import ListRecorder, largest_difference, make_rank, some_text, tiny_config

from charrnn.config import RunConfig
from charrnn.data.corpus import prepare
from charrnn.errors import CheckpointError, ConfigError, CorpusError, TrainingError
from charrnn.windows import Batch
from train.checkpoint.format import load_newest, step_folders
from train.distributed.collectives import Collectives
from train.distributed.setup import make_accelerator
from train.distributed.signals import StopSignals
from train.distributed.watchdog import Watchdog, connect_store
from train.loop.control import Control
from train.loop.trainer import Trainer
from train.main import leave
from train.run import find_start

RANK = int(os.environ.get("RANK", "0"))
HUNG_S = 200  # a worker that has not ended by then prints all its stacks and dies
SPOILT = 4  # the step in which a fault is injected
# A gradient of several buckets of 1 MiB.
LARGE = ("model.hidden_dim=256", "model.embedding_dim=64", "train.max_steps=20", "eval.every=0", "checkpoint.every=0")

SCENARIOS: dict[str, Callable[[Path], None]] = {}


def scenario(function: Callable[[Path], None]) -> Callable[[Path], None]:
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


def refused(action: Callable[[], Any], kind: type[Exception], text: str) -> str:
    """Asserts that `action` ends with an error of that kind, whose message begins so; returns the message."""
    with pytest.raises(kind) as caught:
        action()
    assert str(caught.value).startswith(text), caught.value
    return str(caught.value)


def losses(trainer: Trainer) -> list[float]:
    return list(trainer.recorder.losses().values())


def saved_steps(config: RunConfig) -> list[int]:
    """The steps of the run's checkpoints, newest first, of which the newest is complete."""
    run_dir = Path(config.train.run_dir)
    steps = [int(folder.name.removeprefix("step-")) for folder in step_folders(run_dir)]
    newest = load_newest(run_dir) if steps else None
    assert (newest.step if newest else None) == (steps[0] if steps else None)
    return steps


# What ranks exchange


@scenario
def all_ranks_receive_the_same_status(folder: Path) -> None:
    here = ranks()
    assert (here.world_size, here.is_main) == (2, RANK == 0)

    def agreed(stop: int = 0, fault: bool = False, batch: Sequence[int] = (1, 2)) -> tuple[float, int]:
        control = Control(here, StopSignals())
        control.signals.received = stop
        control.note(CheckpointError(f"of {RANK}") if fault else None)
        return control.agree(6, np.array(batch), 100.25 + RANK), control.stopped_by

    assert agreed() == (100.25, 0)
    assert agreed(stop=15 * RANK) == (100.25, 15)
    assert agreed(stop=10 + RANK) == (100.25, 10)
    assert refused(lambda: agreed(fault=RANK == 1), CheckpointError, "") == "rank 1: of 1"
    assert refused(lambda: agreed(fault=True), CheckpointError, "") == "of 0"
    mismatch = "batch mismatch at step 7: rank(s) 1 and rank 0 "
    refused(lambda: agreed(batch=(1, 2 + RANK)), TrainingError, mismatch)
    refused(lambda: agreed(batch=(1, 2) if RANK else (2, 1)), TrainingError, mismatch)


@scenario
def values_are_gathered_in_rank_order(folder: Path) -> None:
    here = ranks()
    gathered = here.all_gather({"rank": RANK, "nested": [RANK] * (RANK + 1)})
    assert gathered == [{"rank": 0, "nested": [0]}, {"rank": 1, "nested": [1, 1]}]
    assert here.all_gather(None) == [None, None]


@scenario
def an_error_of_one_rank_is_raised_on_all(folder: Path) -> None:
    here = ranks()

    def fail_on(*failing: int) -> Callable[[], int]:
        def action() -> int:
            if RANK in failing:
                raise (CheckpointError if RANK else ConfigError)(f"of {RANK}")
            return 10 + RANK

        return action

    assert here.run_on_all(fail_on()) == 10 + RANK
    assert refused(lambda: here.run_on_all(fail_on(1)), CheckpointError, "") == "rank 1: of 1"
    for failing in ((0,), (0, 1)):
        assert refused(lambda f=failing: here.run_on_all(fail_on(*f)), ConfigError, "") == "of 0"
    assert here.all_gather(RANK) == [0, 1]


@scenario
def the_local_main_process_runs_first(folder: Path) -> None:
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

    assert here.local_main_first(prepare_once) == ("found" if RANK else "made")
    assert refused(lambda: here.local_main_first(fail_on(0)), CorpusError, "") == "of 0"
    assert refused(lambda: here.local_main_first(fail_on(1)), CorpusError, "") == "rank 1: of 1"
    # After an error of the first, nothing ran on the second.
    assert [path.name for path in folder.glob("ran-on-*")] == ["ran-on-0-beside-1"]


@scenario
def watchdogs_meet_in_the_launchers_store(folder: Path) -> None:
    here = ranks()
    dog = Watchdog(connect_store(30.0, "dog"), RANK, 2, 30.0)
    here.barrier()
    assert dog.check_peers() is None
    here.barrier()
    if RANK == 1:
        dog.sign_off()
    here.barrier()
    assert dog.check_peers() is None
    assert dog._peers[1].line == "left"


# Where they start


@scenario
def different_steps_are_refused(folder: Path) -> None:
    """Run folders on disks of their own: rank 0 finds a checkpoint there, rank 1 none."""
    config = config_of(folder, f"apart-{RANK}", "train.max_steps=3", "checkpoint.every=0", "eval.every=0")
    make_rank(config).fit()
    _start_is_refused(config, CheckpointError, "rank 1 finds step 0 in ")


@scenario
def different_texts_are_refused(folder: Path) -> None:
    source = [f"data.source={folder / 'other.txt'}"] if RANK else []
    _start_is_refused(config_of(folder, "texts", *source), CorpusError, "corpus mismatch: rank 1 has SHA-256 ")


@scenario
def checkpoints_damaged_on_one_rank_are_refused(folder: Path) -> None:
    """In a run folder of its own."""
    config = config_of(folder, "damaged-on-1" if RANK else "absent")
    if RANK:
        Path(config.train.run_dir, "step-00000005").mkdir(parents=True)
    _start_is_refused(config, CheckpointError, "rank 1: none of the 1 checkpoint(s) in ")


def _start_is_refused(config: RunConfig, kind: type[Exception], text: str) -> None:
    here, run_dir = ranks(), Path(config.train.run_dir)
    refused(lambda: find_start(config, prepare(config.data), run_dir, here, resume=True), kind, text)


# Faults of one rank


def ends_all(
    config: RunConfig,
    inject: Callable[[Trainer], Any],
    kind: type[Exception],
    text: str,
    *,
    steps: tuple[int, int],
    saved: Sequence[int],
    recorder: ListRecorder | None = None,
) -> None:
    """Asserts how training ends on all ranks after `inject`: by the same error, at the same step.

    Args:
        config: The run's.
        inject: Called with this rank's trainer.
        kind: Of the error.
        text: That it begins with.
        steps: Bounds of the steps that were made.
        saved: Steps of the checkpoints that are left.
        recorder: Of the trainer.
    """
    trainer = make_rank(config, recorder)
    inject(trainer)
    message = refused(trainer.fit, kind, text)
    reached = (trainer.progress.step, message)
    assert trainer.control.collectives.all_gather(reached) == [reached] * 2
    assert steps[0] <= trainer.progress.step <= steps[1]
    assert len(losses(trainer)) <= trainer.progress.step
    assert saved_steps(config) == list(saved)


def spoil_loss(value: float) -> Callable[[Trainer], None]:
    """Multiplies rank 1's loss of step SPOILT."""

    def inject(trainer: Trainer) -> None:
        def spoil(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
            if trainer.progress.step != SPOILT - 1 or not module.training:
                return None
            return output[0] * value, output[1]

        if RANK == 1:
            trainer.accelerator.unwrap_model(trainer.update.loss_module).register_forward_hook(spoil)

    return inject


@scenario
def a_loss_that_is_not_finite_ends_all(folder: Path) -> None:
    for value in (float("nan"), float("inf")):
        config, text = (
            config_of(folder, str(value), "checkpoint.every=2"),
            f"training diverged at step 4: loss {value}, ",
        )
        ends_all(config, spoil_loss(value), TrainingError, text, steps=(4, 4), saved=[2])


@scenario
def a_loss_that_is_read_late_ends_all_at_that_step(folder: Path) -> None:
    """Metrics come to the host every five steps."""
    config = config_of(folder, "nan-late", "log.every=5", "eval.every=0", "checkpoint.every=0")
    text = "training diverged at step 4: loss nan, "
    ends_all(config, spoil_loss(float("nan")), TrainingError, text, steps=(5, 5), saved=[])


def change_starts(row: slice, by: int) -> Callable[[Trainer], None]:
    """Moves the windows that rank 1 takes step SPOILT to be made of."""

    def inject(trainer: Trainer) -> None:
        batch = trainer.data.plan.batch

        def changed(step: int) -> Batch:
            complete = batch(step)
            if step != SPOILT - 1:
                return complete
            starts = complete.starts.copy()
            starts[row] += by
            return Batch(starts, complete.reset)

        if RANK == 1:
            object.__setattr__(trainer.data.plan, "batch", changed)

    return inject


@scenario
def an_index_outside_the_text_ends_all(folder: Path) -> None:
    config, text = (
        config_of(folder, "outside", "checkpoint.every=2"),
        "rank 1: the batch of step 4 wants characters 0 to 1000",
    )
    ends_all(config, change_starts(slice(None), 10**9), TrainingError, text, steps=(3, 3), saved=[2])


@scenario
def other_windows_end_all(folder: Path) -> None:
    """One of rank 0's, which rank 1 never reads."""
    config, text = config_of(folder, "other", "checkpoint.every=2"), "batch mismatch at step 4: rank(s) 1 and rank 0 "
    ends_all(config, change_starts(slice(0, 1), 1), TrainingError, text, steps=(3, 3), saved=[2])


@scenario
def a_full_disk_of_rank_0_ends_all(folder: Path) -> None:
    """From step SPOILT on; the write is in the background: some steps are made until it has failed."""
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

    text = f"cannot write checkpoint {config.train.run_dir}/step-00000006: No space left on device; free space"
    with contextlib.ExitStack() as undo:
        ends_all(config, fill, CheckpointError, text, steps=(6, 199), saved=[3])


@scenario
def a_record_refused_on_rank_0_ends_all(folder: Path) -> None:
    """As metrics.jsonl on a full disk."""

    class Refusing(ListRecorder):
        def record(self, values: dict[str, Any]) -> None:
            if RANK == 0 and values["step"] == SPOILT:
                raise CheckpointError("cannot write metrics.jsonl")
            super().record(values)

    config, text = config_of(folder, "refused", "checkpoint.every=2"), "cannot write metrics.jsonl"
    ends_all(config, lambda _: None, CheckpointError, text, steps=(4, 4), saved=[4, 2], recorder=Refusing())


# Stops


# How gradients cross


@scenario
def gradient_communication_options_barely_change_losses(folder: Path) -> None:
    plain: list[float] = []
    for settings, tolerance in (  # tolerance: the largest relative difference of a loss from the plain one
        ((), 0),
        (("train.bucket_mb=1",), 0),
        (("train.grad_compression=bf16",), 1e-4),
        (("train.grad_compression=fp16",), 5e-5),
        (("train.accumulation_steps=2",), 1e-5),
    ):
        trainer = make_rank(config_of(folder, "-".join(("gradients", *settings)), *LARGE, *settings))
        trainer.fit()
        module: Any = trainer.update.loss_module
        assert module.gradient_as_bucket_view
        assert module.bucket_bytes_cap == (1 if "train.bucket_mb=1" in settings else 25) * 2**20
        assert trainer.model.num_parameters() * 4 > 2 * 2**20  # more than a bucket of 1 MiB
        compressed = [s.partition("=")[2] for s in settings if "grad_compression" in s]
        hooks = [hook.__name__ for hook, _ in module._comm_hooks]
        assert len(hooks) == len(compressed)
        assert all(kind in hook for kind, hook in zip(compressed, hooks, strict=True))
        weights = [tensor.tolist() for tensor in trainer.model.state_dict().values()]
        assert weights == trainer.control.collectives.all_gather(weights)[1 - RANK]
        found = losses(trainer)
        plain = plain or found
        assert plain[-1] < 0.7 * plain[0]
        assert largest_difference(found, plain) <= tolerance
        assert (found == plain) or compressed or tolerance


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    failures = {}
    for name, play in SCENARIOS.items():
        print(f"{RANK}: {name}", file=sys.stderr, flush=True)
        try:
            play(folder)
            failures[name] = ""
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"rank-{RANK}.json").write_text(json.dumps(failures), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
