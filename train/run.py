"""A run from its config to its model file: processes, corpus, starting point, training, export, closing words."""

import contextlib
import logging
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from charrnn.config import RunConfig, dump_config
from charrnn.data.corpus import Corpus, prepare
from charrnn.data.download import without_credentials
from charrnn.errors import CheckpointError, ConfigError
from charrnn.io import expand_user
from charrnn.log import configure_logging
from train.checkpoint.format import BEST, load_for_inference, remove_unfinished
from train.checkpoint.resume import StartingPoint, check_same_start, identity_fields, starting_point
from train.checkpoint.run_lock import only_run_in
from train.dataloader import total_steps, window_plan
from train.distributed.collectives import Collectives
from train.distributed.setup import check_processes, check_same_config, make_accelerator, set_threads, shared_fields
from train.distributed.signals import StopSignals, stop_error
from train.distributed.watchdog import Watchdog, connect_store, is_collective_error
from train.errors import memory_explained
from train.export.exporter import export_checkpoint
from train.flops import peak_flops
from train.memory import keep_freed_memory
from train.sizing import Chosen, sized
from train.state import progress_of
from train.tracking.recorder import Recorder
from train.tracking.summary import closing_lines, goes_on, opening_lines, stopped_line
from train.trainer import Trainer


def run(config: RunConfig, *, config_name: str, resume: bool, chosen: Chosen | None = None) -> Path | None:
    """Trains, exports and reports. Returns the model file on the main process, None on others.

    config_name: the run folder's name begins with it, unless empty. chosen: what the user set, when the recipe is to
    choose the rest; None takes `config` as it is.

    Raises: CharRNNError for everything that is the user's to mend, and for a stop that was asked for. A process whose
    peers are lost does not return: the watchdog ends it.
    """
    accelerator = make_accelerator(config.train)
    configure_logging(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_threads(config.train.threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    collectives = Collectives(accelerator)
    compare_configs(config, collectives, accelerator)
    if chosen is None:
        check_processes(config, accelerator.num_processes)
    with watched(config, collectives) as watchdog, contextlib.ExitStack() as held:
        corpus = collectives.local_main_first(lambda: prepare(config.data, progress=collectives.is_local_main))
        name = f"{config_name}-{corpus.name}" if config_name else corpus.name
        run_dir = expand_user(config.train.run_dir or Path("checkpoints") / name)
        if expand_user(config.data.source).resolve() == run_dir.resolve():
            raise ConfigError(f"--data {config.data.source} is the run folder too; choose another --run-dir")
        explanation: list[str] = []
        if chosen is not None:
            config, explanation = sized(chosen, config, corpus, run_dir, accelerator, collectives)
            corpus = replace(corpus, split=config.data.split)
            compare_configs(config, collectives, accelerator)
            check_processes(config, accelerator.num_processes)
        config, corpus = without_secrets(config, corpus)
        held.enter_context(memory_explained(config))
        window_plan(config, len(corpus.train))  # refuses a text that is too small before a run folder is made
        watchdog.advice = lambda: goes_on(run_dir)
        collectives.run_on_all(lambda: held.enter_context(only_run_in(run_dir)) if collectives.is_main else None)
        start = find_start(config, corpus, run_dir, collectives, resume=resume)
        recorder = collectives.run_on_all(lambda: open_recorder(config, corpus, run_dir, start, accelerator))
        held.callback(recorder.close)
        signals = StopSignals(watchdog.shorten_timeout)
        peak = peak_flops(accelerator.device, accelerator.mixed_precision) if collectives.is_main else None
        trainer = Trainer(
            config,
            corpus,
            start,
            accelerator,
            run_dir,
            recorder,
            collectives=collectives,
            signals=signals,
            heartbeat=watchdog.heartbeat,
            peak_flops=peak and peak * collectives.world_size,
        )
        opening = opening_lines(
            config,
            trainer.data,
            start,
            accelerator,
            run_dir,
            num_parameters=trainer.model.num_parameters(),
            total_steps=trainer.schedule.total_steps,
        )
        recorder.lines([*opening, *explanation])
        with signals.handled():
            return train_and_export(trainer, watchdog)


def train_and_export(trainer: Trainer, watchdog: Watchdog) -> Path | None:
    """The run proper. Returns the model file on the main process. Raises: CharRNNError, as `run` does."""
    collectives, recorder, p = trainer.control.collectives, trainer.recorder, trainer.progress
    try:
        display = recorder.display(p.step, p.elapsed_s, trainer.schedule.total_steps, trainer.data.plan.steps_per_epoch)
        with display, watchdog.training():
            trainer.fit()
        # Together: a launcher takes the first rank to leave for a failure, and ends the others.
        model_file = collectives.run_on_all(lambda: finish(trainer))
    except RuntimeError as error:
        failure = watchdog.find_failure() if is_collective_error(error) else None
        if failure is None:
            raise
        recorder.close()
        watchdog.exit(failure)
    if stopped_by := trainer.control.stopped_by:
        raise stop_error(stopped_by, stopped_line(stopped_by, trainer.progress.step, trainer.checkpoints.run_dir))
    trainer.accelerator.end_training()
    return model_file


def without_secrets(config: RunConfig, corpus: Corpus) -> tuple[RunConfig, Corpus]:
    """Both as they may be written down and sent to a tracker: addresses without users, passwords and queries."""
    cleaned = {name: without_credentials(getattr(config.data, name)) for name in ("source", "mirror")}
    data = config.data.model_copy(update=cleaned)
    return config.model_copy(update={"data": data}), replace(corpus, source=data.source)


def compare_configs(config: RunConfig, collectives: Collectives, accelerator: Accelerator) -> None:
    """Raises: ConfigError on every rank when their configs differ."""
    check_same_config(collectives.all_gather(shared_fields(config, accelerator.mixed_precision)))


@contextlib.contextmanager
def watched(config: RunConfig, collectives: Collectives) -> Iterator[Watchdog]:
    """The watch over the other processes, when there are any and `train.peer_timeout` is not 0."""
    timeout_s = config.train.peer_timeout
    if collectives.world_size == 1 or not timeout_s:
        yield Watchdog(None, 0, 1, timeout_s)
        return
    store = connect_store(timeout_s, collectives.all_gather(uuid.uuid4().hex)[0])
    watchdog = Watchdog(store, collectives.rank, collectives.world_size, timeout_s)
    collectives.barrier()
    with watchdog.running():
        yield watchdog


def find_start(
    config: RunConfig, corpus: Corpus, run_dir: Path, collectives: Collectives, *, resume: bool
) -> StartingPoint:
    """Where the run starts, the same on every rank. Raises: CheckpointError, as `starting_point` does."""
    collectives.run_on_all(lambda: remove_unfinished(run_dir) if collectives.is_main else None)

    def warn(text: str) -> None:
        if collectives.is_main:
            print(f"warning: {text}", file=sys.stderr)

    start = collectives.run_on_all(lambda: starting_point(config, corpus, run_dir, resume=resume, warn=warn))
    check_same_start(collectives.all_gather((start.resumed.step if start.resumed else 0, corpus.sha256)), run_dir)
    return start


def open_recorder(
    config: RunConfig, corpus: Corpus, run_dir: Path, start: StartingPoint, accelerator: Accelerator
) -> Recorder:
    """Where this rank's figures go. Raises: CheckpointError when the run folder can't be written."""
    extra = {"corpus": identity_fields(corpus), "processes": accelerator.num_processes}
    resumed_step = start.resumed.step if start.resumed else 0
    if accelerator.is_main_process:
        write_run_config(config, run_dir)
        if is_finished(config, corpus, start):  # the tracker has it all
            config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"tracker": "none"})})
        return Recorder.open(config, run_dir, extra, resumed_step)
    return Recorder.null()


def is_finished(config: RunConfig, corpus: Corpus, start: StartingPoint) -> bool:
    """Whether the checkpoint to resume from is a run's end, so that nothing is left to train or evaluate."""
    if not start.resumed:
        return False
    progress = progress_of(start.resumed)
    steps = total_steps(config, window_plan(config, len(corpus.train)).steps_per_epoch)
    return progress.evaluated_step == progress.step and progress.done(config, steps, decayed=True)


def write_run_config(config: RunConfig, run_dir: Path) -> None:
    """The resolved config as RUN/config.yaml. Raises: CheckpointError when the folder can't be written."""
    try:
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to run folder {run_dir}: {error.strerror}; choose another --run-dir"
        ) from None


def finish(trainer: Trainer) -> Path | None:
    """Ends the tracker's run; on the main process of a run that was not stopped, exports the best checkpoint first."""
    run_dir = trainer.checkpoints.run_dir
    if trainer.control.stopped_by or not trainer.accelerator.is_main_process:
        trainer.recorder.lines(trainer.recorder.finish({}, None, trainer.progress.step))
        return None
    best = load_for_inference(run_dir / BEST)
    model_file = run_dir / "model.onnx"
    difference = export_checkpoint(best, model_file)
    tracker_lines = trainer.recorder.finish(best.trainer["metrics"], model_file, best.step)
    closing = closing_lines(trainer.data, trainer.progress, best, run_dir, model_file, difference)
    trainer.recorder.lines(closing + tracker_lines)
    return model_file
